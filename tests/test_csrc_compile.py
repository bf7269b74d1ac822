"""The CUDA sources compile for sm_80, sm_90a and sm_100 without a GPU, and no kernel keeps anything in local memory.

`pytest -s` prints the table of registers and shared memory.
"""

import pathlib
import re
import shutil
import subprocess
import time

import pytest

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine (CUDA toolkit)")

SOURCES = sorted((pathlib.Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")
# A report of ptxas: the entry's name and architecture, its memory, its registers.
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


KERNEL = re.compile(r"((?:logps_fwd|logps_bwd|residual|scale|dpo)_kernel)I(\w+?)EEv")
WORDS = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32", "Lb0": "log-probs", "Lb1": "statistics"}


def readable(name: str) -> str:
    """`logps_fwd_kernel<bf16, Scaled, statistics>` for the mangled name of a kernel."""
    kernel, arguments = KERNEL.search(name).groups()
    parts = re.findall(r"^(?:13__nv_bfloat16|6__half|f)|Scaled|Capped|Lb[01]", arguments)
    return f"{kernel}<{', '.join(WORDS.get(part, part) for part in parts)}>"


def entries(ptx: str) -> dict[str, str]:
    """The text of each kernel in a file of PTX."""
    parts = re.split(r"\.entry (\w+)\(", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_kernel_spills(source, tmp_path):
    """No registers in local memory, and rows are read (and written) 16 bytes at a time."""
    begin = time.perf_counter()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    keep = ["--keep", "--keep-dir", str(tmp_path), "-o", str(tmp_path / "kernels.o")]
    command = ["nvcc", "-c", "-O3", "-std=c++17", *targets, "-Xptxas", "-v", *keep, str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    reports = list(REPORT.finditer(built.stderr))
    table, spilled = [], []
    for report in reports:
        shared = re.search(r"(\d+) bytes smem", report["rest"])
        row = f"sm_{report['arch']:4s} {readable(report['name']):45s} registers {report['registers']:>3s}  "
        row += f"shared {shared[1] if shared else 0:>4} B  stack {report['stack']} B"
        table.append(row)
        if any(int(report[kind]) for kind in ("stack", "stores", "loads")):
            spilled.append(row)
    print("\n" + "\n".join(sorted(table)) + f"\n{source.name}: {time.perf_counter() - begin:.0f} s")
    assert {report["arch"] for report in reports} == set(ARCHITECTURES)
    # Every kernel of the source must be in the report.
    for kernel in re.findall(r"(\w+_kernel)\(", source.read_text()):
        assert any(kernel in report["name"] for report in reports), kernel
    assert not spilled, "\n".join(spilled)
    for path in tmp_path.glob("*.ptx"):
        for name, text in entries(path.read_text()).items():
            assert "ld.global.v4" in text, (path.name, readable(name))
            assert "fwd" in name or "st.global.v4" in text, (path.name, readable(name))
