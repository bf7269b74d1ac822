"""The extension's CPU part under AddressSanitizer and UBSan: the op tests and the fuzz tests, and what they catch.

setup.py builds it once more, into a folder of its own, with a compiler that is a script: c++ and the sanitizers' flags. A
process that begins with their libraries loads that build as `dpo_fast._csrc` and then runs pytest.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sanitizer_tools import (
    BAD,
    COMPILER,
    FLAGS,
    LIBRARIES,
    PYTEST,
    ROOT,
    assert_caught,
    assert_passed,
    forked,
    sanitized,
    skip_unless_it_starts,
    why_not,
)

SETS = ["DEFAULT", "AVX2", "AVX512"]
BEST = torch.backends.cpu.get_cpu_capability() if torch.backends.cpu.get_cpu_capability() in SETS else "DEFAULT"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not(*LIBRARIES)), reason=why_not(*LIBRARIES)),
]


@pytest.fixture(scope="module")
def extension(tmp_path_factory) -> Path:
    """The sanitized build."""
    skip_unless_it_starts(LIBRARIES)
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


# ---- Calls that must be caught, and calls that must not ----


@pytest.fixture(scope="module")
def ends(extension) -> dict[str, tuple[int, str]]:
    """The exit status and the errors of each call of sanitizer_tools.py."""
    return forked(extension)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_call_is_caught(ends, what):
    assert_caught(ends, what, "csrc/cpu/")


def test_a_target_outside_the_vocabulary_reads_no_other_memory(ends):
    """Its row and its pair are NaN."""
    assert_passed(ends, "outside")


def test_a_good_call_and_an_exception_pass(ends):
    assert_passed(ends, "good")


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
