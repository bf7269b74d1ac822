"""The CUDA kernels of csrc/cuda on a CPU, without a GPU: what they compute, what they touch, and what orders it.

cuda_on_cpu/ stands in for CUDA: it runs each CUDA thread of a block on a stack of its own. The extension is built against it
from the sources as they are, but for the syntax of a launch and the instructions of ptx.cuh: once with AddressSanitizer and
UBSan, which stand for compute-sanitizer's memcheck and for a GPU's fault at a misaligned address; once with ThreadSanitizer,
which stands for its racecheck and knows C++'s memory orders between blocks as well. The op tests then run on it.
"""

import os
import re
import shutil
import subprocess
import sysconfig
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
from torch.utils import cpp_extension

from dpo_fast.backends import eager

FOLDERS = [
    os.environ.get("CUDA_HOME", ""),
    Path(shutil.which("nvcc") or "/").resolve().parent.parent,
    "/usr/local/cuda",
]
HEADER = "include/cuda_bf16.h"
CUDA = next((Path(folder, HEADER).parent for folder in FOLDERS if Path(folder, HEADER).exists()), None)
HERE = ROOT / "tests" / "cuda_on_cpu"
LAUNCH = re.compile(r"(\w+(?:<T>)?)<<<(.+?), (\w+), 0, stream>>>\((.*?)\);", re.DOTALL)
RACES = ("libtsan.so", "libstdc++.so.6")
WHY_NOT = why_not(*LIBRARIES, *RACES) or ("" if CUDA else "no CUDA toolkit, whose headers have the types")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
V = 33_001  # several warps, and rows at odd addresses


# ---- The builds ----


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """csrc/ with launches that a C++ compiler reads, and the ops on CUDA as ops on the CPU."""
    folder = tmp_path_factory.mktemp("cuda")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    launches = 0
    for path in (folder / "csrc/cuda").glob("*.cu"):
        text, found = LAUNCH.subn(r"emulated::launch(\2, \3, [&] { \1(\4); });", path.read_text())
        assert "<<<" not in text
        path.with_suffix(".cpp").write_text(text)
        launches += found
    assert launches == 5
    ops = folder / "csrc/cuda/ops_cuda.cpp"
    ops.write_text(ops.read_text().replace("(dpo_fast_csrc, CUDA, m)", "(dpo_fast_csrc, CPU, m)"))
    shutil.copy(HERE / "ptx.cuh", folder / "csrc/cuda")
    # One file costs less than three, since torch's headers are most of each.
    parts = ("ops.cpp", "cpu/memory.cpp", "cuda/ops_cuda.cpp")
    (folder / "ops.cpp").write_text("".join(f'#include "{folder}/csrc/{part}"\n' for part in parts))
    compile_object(folder, "ops.o", folder / "ops.cpp", "-O0 -DDPO_FAST_CUDA")
    return folder


def compile_object(folder: Path, name: str, source: Path, flags: str) -> str:
    paths = [HERE, *cpp_extension.include_paths(), CUDA, sysconfig.get_paths()["include"]]
    common = ["-std=c++20", "-fPIC", "-w", "-ffp-contract=off", "-DTORCH_EXTENSION_NAME=_csrc"]
    command = [COMPILER, "-c", *common, *(f"-I{path}" for path in paths), *flags.split(), str(source)]
    done = subprocess.run([*command, "-o", str(folder / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return str(folder / name)


def built(folder: Path, name: str, flags: str, flags_of_emulator: str) -> Path:
    kernels = [compile_object(folder, f"{name}_{k}.o", folder / f"csrc/cuda/{k}.cpp", flags) for k in ("logps", "dpo")]
    emulator = compile_object(folder, f"{name}_emulator.o", HERE / "emulator.cpp", flags_of_emulator)
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    torch_libraries += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    out = folder / f"{name}.so"
    # A torch that is built for CUDA has loaded the real functions of these names.
    command = [COMPILER, "-shared", "-Wl,-Bsymbolic", *flags.split(), str(folder / "ops.o"), *kernels, emulator]
    done = subprocess.run([*command, "-o", str(out), *torch_libraries], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def extension(sources) -> Path:
    skip_unless_it_starts(LIBRARIES)
    # dpo_kernel computes the address of row -1 at a place without a row, and does not use it.
    return built(sources, "memory", f"{FLAGS} -fno-sanitize=pointer-overflow", FLAGS)


@pytest.fixture(scope="module")
def racing(sources) -> Path:
    """The emulator itself is not watched: it says what orders the threads."""
    skip_unless_it_starts(RACES)
    return built(sources, "races", "-fsanitize=thread -g1 -O1", "-g1 -O1 -DEMULATOR_SEES_RACES")


# ---- Values, and what is touched ----


def test_op_tests(extension):
    """The table of ops and the random cases, as on the CPU's own part."""
    names = ("op_table", "in_place", "fuzz", "cuda_on_cpu")
    # The head's products are torch's, so a part of its rows is enough; float16 differs from bfloat16 in two conversions.
    chosen = "(csrc and not float16 and (not linear or (bfloat16 and precision))) or emulated"
    options = ["-p", "no:cacheprovider", "-k", chosen, "--hypothesis-profile=short"]
    done = sanitized(extension, PYTEST, *(f"tests/test_{name}.py" for name in names), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 250, done.stdout


@pytest.fixture(scope="module")
def ends(extension) -> dict[str, tuple[int, str]]:
    return forked(extension)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_call_is_caught(ends, what):
    assert_caught(ends, what, "csrc/cuda/")


@pytest.mark.parametrize("what", ["good", "outside"])
def test_other_calls_pass(ends, what):
    """A target outside the vocabulary reads no other memory, and its row and its pair are NaN."""
    assert_passed(ends, what)


@pytest.fixture
def csrc():
    """The extension, in the process that `test_op_tests` starts."""
    csrc = pytest.importorskip("dpo_fast.backends.extension", reason="the extension is not built")
    if csrc.INSTRUCTION_SET != "emulated":
        pytest.skip("test_op_tests starts a process with the emulated extension")
    return csrc


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_emulated_wide_rows(csrc, dtype):
    """At each choice of blocks per multiprocessor: float64's numbers, and the same bits in place."""
    torch.manual_seed(0)
    memory = torch.randn(12, V + 8, dtype=dtype) * 3

    def logits() -> torch.Tensor:
        return memory.clone()[:, 3 : V + 3]

    targets = torch.randint(V, (12,))
    targets[2] = -100
    bounds, ref = torch.tensor([0, 3, 3, 5, 8, 10, 12], dtype=torch.int32), torch.randn(6)
    options = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1, "discopop_tau": 0.05, "simpo_gamma": 0.5}
    true = logits().double()
    exact = eager.dpo_fused(true, targets, bounds, ref.double(), 0.5, out=torch.empty_like(true), **options)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for blocks in (3, 1):
        out, over = torch.full_like(memory, torch.nan)[:, 3 : V + 3], logits()
        found, again = (
            csrc.dpo_fused(x, targets, bounds, ref, 0.5, out=y, blocks_per_sm=blocks, **options)
            for x, y in ((logits(), out), (over, over))
        )
        for one, two, right, share in zip(found, again, exact, (2e-6, 2e-6, rounding), strict=True):
            assert torch.equal(one, two)
            assert (one - right).abs().max() <= share * right.abs().max()
    logps, _ = eager.residual_(true, targets)
    for blocks in (2, 1):
        rows = logits()
        found, _ = csrc.residual_(rows, targets, blocks_per_sm=blocks)
        assert (found - logps).abs().max() <= 2e-6 * logps.abs().max()
        assert (rows - true).abs().max() <= rounding


# ---- What orders it ----

RUN = """
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for width in (3001, 40):
        x, targets = torch.randn(9, width, dtype=dtype), torch.randint(width, (9,))
        targets[2] = -100
        bounds = torch.tensor([0, 3, 5, 5, 9], dtype=torch.int32)
        for blocks in (3, 1):
            for over in (False, True):
                y = x.clone()
                out = y if over else torch.empty_like(y)
                ops.dpo_fused(y, targets, bounds, None, 0.5, 0, 0.1, 0.0, 0.05, 0.5, -100, out, blocks)
        for blocks in (2, 1):
            ops.residual_(x.clone(), targets, -100, 1.0, None, 1.0, True, blocks)
        _, lse, _ = ops.logps_fwd(x, targets, -100, 1.0, 30.0, 1.0, True)
        ops.logps_bwd(x, targets, lse, torch.ones(9), -100, 1.0, 30.0, 1.0, x)
        ops.scale_(x, torch.tensor(2.0))
"""


def run_watched(racing: Path, fault: str = "") -> subprocess.CompletedProcess:
    return sanitized(racing, RUN, libraries=RACES, EMULATOR_FAULT=fault)


def test_no_race(racing):
    """Within a block barriers order what its threads share; between blocks the counters do."""
    done = run_watched(racing)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.parametrize("fault", ["barriers order nothing", "counters order nothing"])
def test_a_race_is_seen(racing, fault):
    done = run_watched(racing, fault)
    assert done.returncode == 99, done.stderr[-5000:]
    assert "data race" in done.stderr
    assert "csrc/cuda/" in done.stderr
