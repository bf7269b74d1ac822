"""The extension's CPU part under AddressSanitizer and UBSan: the op tests and the fuzz tests, and what they catch.

setup.py builds it once more, into a folder of its own, with a compiler that is a script: c++ and the sanitizers' flags. A
process that begins with their libraries loads that build as `dpo_fast._csrc` and then runs pytest.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SETS = ["DEFAULT", "AVX2", "AVX512"]
BEST = torch.backends.cpu.get_cpu_capability() if torch.backends.cpu.get_cpu_capability() in SETS else "DEFAULT"
COMPILER = os.environ.get("CXX", "c++")
# The last -O and -g count: lines in a report, and every check that is a call stays one.
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"


def library(name: str) -> str | None:
    """The path of a library of the compiler, None where it has none."""
    if shutil.which(COMPILER) is None:
        return None
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return os.path.realpath(found) if os.path.isabs(found) else None


# libstdc++ too: AddressSanitizer asks for its __cxa_throw before Python has loaded it.
LIBRARIES = {name: library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")}
MISSING = [name for name, path in LIBRARIES.items() if path is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER})"),
    pytest.mark.skipif(bool(MISSING), reason=f"the compiler has no {' and no '.join(MISSING)}: gcc has them"),
]

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


@pytest.fixture(scope="module")
def extension(tmp_path_factory) -> Path:
    """The sanitized build."""
    folder = tmp_path_factory.mktemp("sanitized")
    script = folder / "c++"
    # csrc/ops.cpp is the names and the schemas: it reads no tensor, and takes long.
    plain = f'case "$*" in *csrc/ops.cpp*) exec {COMPILER} "$@" -O0;; esac'
    script.write_text(f'#!/bin/sh\n{plain}\nexec {COMPILER} "$@" {FLAGS}\n')
    script.chmod(0o755)
    # As with a torch without CUDA: its part is for the GPU's own tools.
    code = "import runpy, sys, torch; torch.version.cuda = None; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"
    build = ["-c", code, "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    environment = os.environ | {"CXX": str(script), "CC": str(script)}
    done = subprocess.run([sys.executable, *build], cwd=ROOT, env=environment, capture_output=True, text=True)
    found = list(folder.glob("dpo_fast/_csrc*.so"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert found, done.stdout + done.stderr
    return found[0]


def sanitized(extension: Path, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`code` in a process that runs under the sanitizers; an error of theirs ends it with status 99."""
    environment |= {
        "LD_PRELOAD": " ".join(LIBRARIES.values()),
        # Python keeps what it allocates: that is no leak.
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-c", LOAD + textwrap.dedent(code), str(extension), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


# ---- Calls that must be caught, and calls that must not ----

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


@pytest.fixture(scope="module")
def ends(extension) -> dict[str, tuple[int, str]]:
    """The exit status and the errors of each of the calls above, which call the extension without its callers' checks."""
    calls = {**{name: code for name, (code, _) in BAD.items()}, "good": GOOD, "outside": OUTSIDE}
    done = sanitized(extension, FORKS, json.dumps(list(calls.values())))
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip(calls, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("what", BAD)
def test_a_bad_call_is_caught(ends, what):
    status, errors = ends[what]
    assert status == 99, errors
    assert BAD[what][1] in errors
    assert "csrc/cpu/" in errors


def test_a_target_outside_the_vocabulary_reads_no_other_memory(ends):
    """Its row and its pair are NaN."""
    status, errors = ends["outside"]
    assert status == 0, errors


def test_a_good_call_and_an_exception_pass(ends):
    status, errors = ends["good"]
    assert status == 0, errors


# ---- The tests ----


@pytest.mark.parametrize("capability", SETS[: SETS.index(BEST) + 1])
def test_op_tests(extension, capability):
    """The tests of the ops on csrc, with the rows of each instruction set of this processor."""
    names = ("op_table", "output_layer", "in_place", "launchers", "one_pass", "fuzz", "fuzz_head", "instruction_sets")
    files = [f"tests/test_{name}.py" for name in names]
    options = ["-p", "no:cacheprovider", "-k", "(csrc or test_same_bits) and not lower"]
    if capability != BEST:
        options.append("--hypothesis-profile=short")
    done = sanitized(extension, PYTEST, *files, *options, ATEN_CPU_CAPABILITY=capability.lower())
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 300, done.stdout
