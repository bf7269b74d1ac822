"""The checks before and beside the measurements on a GPU: the build, chosen tests, all tests, compute-sanitizer."""

import json
import re
import sys
import time
from collections.abc import Sequence

from bench.processes import stream
from bench.results import Results

BUILD = [sys.executable, "setup.py", "build_ext", "--inplace"]
_BACK_ENDS = "import json; from dpo_fast.backends import available_backends as f; print('back ends', json.dumps(f()))"
LAST_LINES = 15  # lines that are kept of the output of a failure

# One test or two for each kernel, in one type; `{}` is a back end on the GPU.
_EACH = (
    "tests/test_ops.py::test_token_logps[{}-dtype1-all-False]",
    "tests/test_ops.py::test_token_logps_of_any_size[{}-5-1000]",
    "tests/test_ops.py::test_token_logps_does_not_read_ignored_rows[{}-False]",
    "tests/test_ops.py::test_token_logps_of_masked_words[{}-temperature]",
    "tests/test_ops.py::test_sequence_logps[{}-dtype2-False-True]",
    "tests/test_ops.py::test_precision[{}-dtype1-0-all-needs0]",
    "tests/test_ops.py::test_precision[{}-dtype1-10-plain-needs1]",
    "tests/test_dpo_loss.py::test_half_precision[{}-sigmoid-True-dtype0]",
    "tests/test_dpo_loss.py::test_half_precision[{}-ipo-False-dtype0]",
    "tests/test_dpo_loss.py::test_one_pair[{}-130-False-lengths0]",
    "tests/test_dpo_loss.py::test_ignored_sequences[{}-a sequence-False-sigmoid]",
    "tests/test_dpo_loss.py::test_head_precision[{}-transform0-50-needs1-dtype1]",
    "tests/test_dpo_loss.py::test_head_precision[{}-transform1-1000-needs0-dtype1]",
)
# Each group runs in a process of its own, since a bad kernel takes the device of its process with it.
GROUPS = (
    tuple(test.format("csrc on cuda") for test in _EACH),
    (
        *(test.format("triton on cuda") for test in _EACH),
        "tests/test_kernels.py::test_rows_equal_float64[(3, 4096)-torch.bfloat16]",
        "tests/test_kernels.py::test_residual[(3, 4096)-plain-torch.bfloat16]",
        "tests/test_kernels.py::test_scale[-0.3-torch.bfloat16]",
        "tests/test_kernels.py::test_every_loss[sigmoid-options0-torch.bfloat16]",
        "tests/test_kernels.py::test_rows_longer_than_a_block[2048-torch.bfloat16]",
        "tests/test_kernels.py::test_in_place_and_strided[8-101]",
        "tests/test_kernels.py::test_same_bits_twice",
        "tests/test_kernels.py::test_many_programs_at_once[mixed]",
    ),
    (
        "tests/test_cuda_attention.py::test_flash_on_a_forest[shape0-None-dtype0]",
        "tests/test_cuda_attention.py::test_flash_on_a_forest[shape2-4-dtype0]",
        "tests/test_cuda_attention.py::test_flash_gives_the_same_bits_twice_where_torch_is_told_so",
        "tests/test_cuda_attention.py::test_flex_on_a_gpu_has_gradients[False-None]",
        "tests/test_packing.py::test_pin_memory",
    ),
)
SMOKE = tuple(test for group in GROUPS for test in group)
DRY = ("tests/test_packing.py::test_rows_by_hand",)


def build(results: Results, seconds: float, command: Sequence[str] = BUILD) -> None:
    """Build the extension; the row says how long it took, which back ends exist now, and why one does not."""
    lines, found = [], {}
    start = time.monotonic()
    why = stream(command, seconds, lines.append)
    took = time.monotonic() - start

    def read(text: str) -> None:
        if text.startswith("back ends "):
            found.update(json.loads(text.removeprefix("back ends ")))

    stream([sys.executable, "-c", _BACK_ENDS], 120, read)
    row = {"op": "build", "took": took, "back_ends": found}
    if why or found.get("csrc"):
        row |= {"failed": why or found["csrc"], "last_lines": lines[-LAST_LINES:]}
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
        if match := re.match(r"(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", text):
            test, outcome = match.groups()
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


def sanitize(
    results: Results, seconds: float, arguments: Sequence[str], tool: Sequence[str] = ("compute-sanitizer",)
) -> None:
    """Run the extension's tests under memcheck, then under racecheck."""
    end = time.monotonic() + seconds
    for check in ("memcheck", "racecheck"):
        before = [*tool, "--tool", check, "--error-exitcode", "9"]
        run_tests(results, arguments, end - time.monotonic(), f"compute-sanitizer {check}", 180, before)
