"""The checks before and beside the measurements on a GPU: the build, chosen tests, all tests, compute-sanitizer."""

import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence

from bench.processes import stream
from bench.results import Results

BUILD = [sys.executable, "setup.py", "build_ext", "--inplace"]
_BACK_ENDS = "import json; from dpo_fast.backends import available_backends as f; print('back ends', json.dumps(f()))"
OUTCOME = r"(?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b"
LAST_LINES = 15  # lines that are kept of the output of a failure

# One test or two for each kernel, in one type: `{}` is a back end on the GPU.
_EACH = tuple(
    f"tests/test_op_table.py::test_op[{row}-{{}}]"
    for row in (
        "token_logps: all, padded-bfloat16",
        "token_logps: 5 rows of 1000-float32",
        "token_logps: masked words, temperature-float32",
        "token_logps: layout shifted-bfloat16",
        "sequence_logps: sum, packed-bfloat16",
        "linear_token_logps: precision, frozen, all, 0 kept-bfloat16",
        "linear_token_logps: precision, trained, plain, 10 kept-bfloat16",
        "dpo_loss: sigmoid, half precision, packed-bfloat16",
        "dpo_loss: ipo, half precision, padded-bfloat16",
        "dpo_loss: lengths 9 2-float32",
        "dpo_loss: sigmoid, a sequence ignored, padded-float32",
        "linear_dpo_loss: precision, trained, plain, 50 kept-bfloat16",
        "linear_dpo_loss: precision, frozen, transform, 1000 kept-bfloat16",
    )
)
# Each group runs in a process of its own, since a bad kernel takes the device of its process with it.
GROUPS = (
    tuple(test.format("csrc on cuda") for test in _EACH),
    (
        *(test.format("triton on cuda") for test in _EACH),
        "tests/test_op_table.py::test_op[token_logps: 3 rows of 4096, statistics-bfloat16-triton on cuda]",
        "tests/test_op_table.py::test_op[linear_token_logps: frozen 3x4096, plain-bfloat16-triton on cuda]",
        "tests/test_op_table.py::test_op[dpo_loss: discopop, two pairs-bfloat16-triton on cuda]",
        "tests/test_op_table.py::test_op[dpo_loss: a power of two-bfloat16-triton on cuda]",
        "tests/test_kernels.py::test_scale[-0.3-torch.bfloat16]",
        "tests/test_kernels_dpo.py::test_in_place_and_strided[101-3]",
        "tests/test_kernels_dpo.py::test_same_bits_twice",
        "tests/test_kernels_dpo.py::test_many_programs_at_once[mixed]",
    ),
    (
        "tests/test_cuda_attention.py::test_flash_on_a_forest[shape0-None-dtype0]",
        "tests/test_cuda_attention.py::test_flash_on_a_forest[shape2-4-dtype0]",
        "tests/test_cuda_attention.py::test_flash_gives_the_same_bits_twice_where_torch_is_told_so",
        "tests/test_cuda_attention.py::test_flex_on_a_gpu_has_gradients[False-None]",
        "tests/test_parts.py::test_pin_memory",
    ),
)
SMOKE = tuple(test for group in GROUPS for test in group)
DRY = ("tests/test_packing.py::test_rows_by_hand",)


def build(results: Results, seconds: float, command: Sequence[str] = BUILD) -> None:
    """Build the extension, or with 0 seconds take the one that is there; the row says how long it took, which back ends exist
    now, and why one does not.
    """
    lines, found = [], {}
    start = time.monotonic()
    why = stream(command, seconds, lines.append) if seconds else None
    took = time.monotonic() - start

    def read(text: str) -> None:
        if text.startswith("back ends "):
            found.update(json.loads(text.removeprefix("back ends ")))

    stream([sys.executable, "-c", _BACK_ENDS], 120, read)
    row = {"op": "build", "took": took, "back_ends": found}
    if why or found.get("csrc"):
        # A build that fails with CUDA is followed by one without.
        errors = [text for text in lines if re.search(r"\berror\b|^dpo_fast: |Error: ", text)]
        row |= {"failed": why or found["csrc"], "last_lines": (errors or lines)[-LAST_LINES:]}
    results.add(**row)


def run_tests(
    results: Results,
    arguments: Sequence[str],
    seconds: float,
    name: str,
    silence: float = 60,
    before: Sequence[str] = (),
) -> None:
    """Run pytest with `arguments` under `before`: one row for each red test as it comes, then one with the counts.

    Where the arguments are tests, a test that does not exist or that hangs for `silence` seconds is a row, and the others
    are run.
    """
    command = [*before, sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", *arguments]
    counts, seen, lines, missing = {}, set(), [], []
    start = last = time.monotonic()

    def read(text: str) -> None:
        nonlocal last
        lines.append(text)
        if match := re.match(rf"(?P<test>\S+::.*) {OUTCOME}", text) or re.match(
            rf"\[gw\d+\].* {OUTCOME} (?P<test>\S+::.*)", text
        ):
            test, outcome = match["test"].strip(), match["outcome"]
            seen.add(test)
            counts[outcome] = counts.get(outcome, 0) + 1
            took, last = time.monotonic() - last, time.monotonic()
            if outcome in ("FAILED", "ERROR"):
                results.add(op=name, test=test, failed=f"{outcome.lower()}: {test}", took=took)
            else:
                results.now(test)
        # The error comes on the other stream, maybe after "collecting ... " on the same line.
        elif match := re.search(r"ERROR: not found: (\S*?)(tests/.*)", text):
            missing.append(match.group(2))

    why = stream(command, seconds, read, silence)
    took = time.monotonic() - start
    for test in missing:  # pytest runs no test where one is missing
        results.add(op=name, test=test, failed=f"there is no such test: {test}")
    red = counts.get("FAILED", 0) + counts.get("ERROR", 0)
    row = {"passed": counts.get("PASSED", 0), "red": red, "skipped_tests": counts.get("SKIPPED", 0), "took": took}
    rest = [test for test in arguments if test not in seen and test not in missing and "::" in test]
    if why and why.startswith("said nothing") and rest:
        results.add(op=name, test=rest[0], failed=f"{why}: {rest.pop(0)}")
    if why and not missing:
        details = [text for text in lines if text.startswith(("E  ", "FAILED", "ERROR"))]
        row |= {"failed": f"{why}; {row['passed']} passed, {red} red", "last_lines": (details or lines)[-LAST_LINES:]}
    if seen or not missing:
        results.add(op=name, **row)
    hung = why is not None and why.startswith("said nothing")
    if rest and (missing or hung):
        run_tests(results, rest, seconds - took, name, silence, before)


def side_by_side() -> list[str]:
    """The options with which pytest runs tests in several processes, where it can: most of their time is Triton's compiler."""
    processes = min(8, (os.cpu_count() or 1) // 2)
    return ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []


def sanitizer() -> str:
    """compute-sanitizer, which may lie beside nvcc and not on the PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return (
        shutil.which("compute-sanitizer")
        or shutil.which("compute-sanitizer", path=f"{home}/bin")
        or "compute-sanitizer"
    )


def sanitize(results: Results, seconds: float, arguments: Sequence[str], tool: Sequence[str] = ()) -> None:
    """Run the extension's tests under memcheck, then under racecheck. `tool` is a stand-in for compute-sanitizer."""
    tool = tool or [sanitizer()]
    end = time.monotonic() + seconds
    for check in ("memcheck", "racecheck"):
        before = [*tool, "--tool", check, "--error-exitcode", "9"]
        run_tests(results, arguments, end - time.monotonic(), f"compute-sanitizer {check}", 180, before)
