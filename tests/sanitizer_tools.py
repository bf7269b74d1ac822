"""A build of the extension under the compiler's sanitizers, in a process that begins with their libraries."""

import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX", "c++")
# The last -O and -g count: lines in a report, and every check that is a call stays one.
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"


@functools.cache
def library(name: str) -> str | None:
    """The path of a library of the compiler, None where it has none."""
    if shutil.which(COMPILER) is None:
        return None
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return os.path.realpath(found) if os.path.isabs(found) else None


# libstdc++ too: AddressSanitizer asks for its __cxa_throw before Python has loaded it.
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so.6")


def why_not(*libraries: str) -> str:
    """Why nothing can be built with these libraries and run here; empty where it can."""
    if sys.platform != "linux":
        return "LD_PRELOAD works on Linux only"
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler ({COMPILER})"
    missing = [name for name in libraries if library(name) is None]
    return f"the compiler has no {' and no '.join(missing)}: gcc has them" if missing else ""


LOAD = """
import importlib.util
import sys
import torch

spec = importlib.util.spec_from_file_location("dpo_fast._csrc", sys.argv.pop(1))
module = sys.modules["dpo_fast._csrc"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from dpo_fast.backends import extension as csrc
assert csrc._csrc is module and module.__file__ == spec.origin
ops = torch.ops.dpo_fast_csrc
"""
PYTEST = """
import pytest
status = pytest.main(sys.argv[1:])
assert sys.modules["dpo_fast._csrc"] is module and sys.modules["dpo_fast.backends.extension"]._csrc is module
sys.exit(status)
"""
# Every call in a fork of one process, since a report of the sanitizers ends the process.
FORKS = """
import json, os, tempfile, traceback
found = []
for code in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            os.dup2(errors.fileno(), 2)
            try:
                exec(code)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        errors.seek(0)
        found.append([status, errors.read().decode()])
print(json.dumps(found))
"""


def skip_unless_it_starts(libraries: Iterable[str]) -> None:
    """Skip where nothing runs under these libraries, such as ThreadSanitizer where the kernel spreads addresses too widely."""
    done = subprocess.run(
        [sys.executable, "-c", "print('well')"],
        env=os.environ
        | {"LD_PRELOAD": " ".join(library(name) for name in libraries), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    if done.returncode or "well" not in done.stdout:
        pytest.skip(f"the sanitizers' libraries do not run here: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


def sanitized(
    extension: Path, code: str, *arguments: str, libraries: Iterable[str] = LIBRARIES, **environment: str
) -> subprocess.CompletedProcess:
    """`code` in a process that runs under the sanitizers; an error of theirs ends it with status 99."""
    environment |= {
        "LD_PRELOAD": " ".join(library(name) for name in libraries),
        # Python keeps what it allocates: that is no leak.
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=99:ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-c", LOAD + textwrap.dedent(code), str(extension), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


# Calls that must be caught, with what is said then, and calls that must not.
BAD = {
    "a vector past the end of a row": (
        "x = torch.zeros(1, 64); x.untyped_storage().resize_(63 * 4);"
        "ops.logps_fwd(x, torch.tensor([0]), -100, 1.0, None, 1.0, False)",
        "AddressSanitizer",
    ),
    "a vector stored past the end": (
        "x, out = torch.zeros(2, 1, 64); out = out.clone(); out.untyped_storage().resize_(60 * 4);"
        "ops.logps_bwd(x, torch.tensor([0]), torch.ones(1), torch.ones(1), -100, 1.0, None, 1.0, out)",
        "AddressSanitizer",
    ),
    "bounds past the last row": (
        "cu = torch.tensor([0, 1, 3], dtype=torch.int32); x = torch.zeros(2, 5);"
        "ops.dpo_fused(x, torch.tensor([0, 0]), cu, None, 1.0, 0, 0.1, 0.0, 0.05, 0.5, -100, x.clone(), 3)",
        "heap-buffer-overflow",
    ),
    "floats at an odd address": (
        "x = torch.frombuffer(bytearray(161), dtype=torch.float32, offset=1)[None];"
        "ops.logps_fwd(x, torch.tensor([3]), -100, 1.0, None, 1.0, False)",
        "misaligned address",
    ),
}
GOOD = """
ops.logps_fwd(torch.zeros(1, 40), torch.tensor([39]), -100, 1.0, None, 1.0, False)
try:
    ops.logps_fwd(torch.zeros(1, 40).double(), torch.tensor([39]), -100, 1.0, None, 1.0, False)
except RuntimeError as error:
    assert "float32, bfloat16 or float16" in str(error)
"""
OUTSIDE = """
x, cu = torch.zeros(2, 40), torch.tensor([0, 1, 2], dtype=torch.int32)
for bad in (40, -1, 2**62, -(2**63)):
    targets = torch.tensor([bad, 7])
    logps, lse, stats = ops.logps_fwd(x, targets, -100, 1.0, None, 1.0, True)
    assert logps.isnan().tolist() == [True, False] and stats[2, 0] == 0
    out = torch.empty(2, 40)
    ops.logps_bwd(x, targets, lse, torch.ones(2), -100, 1.0, None, 1.0, out)
    assert out.isnan().all(1).tolist() == [True, False]
    residual = x.clone()
    assert torch.equal(ops.residual_(residual, targets, -100, 1.0, None, 1.0, False, 2)[0].isnan(), logps.isnan())
    assert torch.equal(residual.isnan(), out.isnan())
    losses, _ = ops.dpo_fused(x, targets, cu, None, 1.0, 0, 0.1, 0.0, 0.05, 0.5, -100, out, 3)
    assert losses.isnan().all() and out.isnan().all()
"""


def assert_caught(ends: dict[str, tuple[int, str]], what: str, folder: str) -> None:
    """The bad call `what` was reported, in code of that folder; `ends` is what `forked` returns."""
    status, errors = ends[what]
    assert status == 99, errors
    assert BAD[what][1] in errors
    assert folder in errors


def assert_passed(ends: dict[str, tuple[int, str]], what: str) -> None:
    """Nothing was reported of the call `what`."""
    status, errors = ends[what]
    assert status == 0, errors


def forked(extension: Path) -> dict[str, tuple[int, str]]:
    """The exit status and the errors of each call above, which calls the extension without its callers' checks."""
    calls = {**{name: code for name, (code, _) in BAD.items()}, "good": GOOD, "outside": OUTSIDE}
    done = sanitized(extension, FORKS, json.dumps(list(calls.values())))
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip(calls, json.loads(done.stdout.splitlines()[-1]), strict=True))
