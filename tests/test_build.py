"""setup.py where it cannot build the extension, the messages then, and the contents of the source archive."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")
)
pytestmark = pytest.mark.slow  # each is two seconds of imports
WITHOUT_TORCH = "sys.modules['torch'] = None; "


def python(code: str, cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter whose only dpo_fast is that of `cwd`: an editable install would add its extension."""
    code = f"import sys; sys.meta_path = [x for x in sys.meta_path if 'Editable' not in repr(x)]\n{code}"
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "CC")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)


def setup(tmp_path: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    """`python setup.py build_ext` into `tmp_path`."""
    code = f"{before}import runpy, sys; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "objects")]
    return python(code, ROOT, "build_ext", *folders, **environment)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, with nothing built."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("dpo_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


# ---- The extension cannot be built ----


def says_loudly(done: subprocess.CompletedProcess, tmp_path: Path, why: str) -> None:
    """The install goes on without the extension, and a message says so clearly."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dpo_fast: the extension is not built" in done.stderr
    assert why in done.stderr
    assert "!" * 80 in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_torch(tmp_path):
    done = setup(tmp_path, WITHOUT_TORCH)
    says_loudly(done, tmp_path, "install torch, then run pip with --no-build-isolation")


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler-of-dpo-fast"])
def test_with_a_compiler_that_fails(tmp_path, compiler):
    says_loudly(setup(tmp_path, CXX=compiler, CC=compiler), tmp_path, "Error")


# ---- Where CUDA is ----


def cuda_home(tmp_path: Path, **environment: str) -> str:
    """CUDA_HOME as setup.py sets it, with a script called nvcc on the PATH that belongs to `tmp_path`/toolkit."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "toolkit/bin").mkdir(parents=True)
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ _CUDART_=cudart' >&2\necho '#$ TOP={tmp_path}/toolkit/bin/..' >&2\n")
    nvcc.chmod(0o755)
    code = "import os, runpy; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py', run_name='__main__')"
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = python(
        f"{code}; print(os.environ.get('CUDA_HOME'))",
        ROOT,
        **{"PATH": path, "CUDA_HOME": "", "CUDA_PATH": ""} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_an_nvcc_that_is_a_script_names_its_toolkit(tmp_path):
    assert cuda_home(tmp_path) == str(tmp_path / "toolkit")


def test_a_toolkit_that_is_named_stays(tmp_path):
    assert cuda_home(tmp_path, CUDA_HOME="/elsewhere") == "/elsewhere"


# ---- What is said afterwards ----

NAMES = "from dpo_fast.info import main; main([])"
DEFAULT = "from dpo_fast.backends import resolve; print(resolve(None, 'cpu').name); resolve('csrc', 'cpu')"


def test_info_says_why_and_torch_takes_over(checkout):
    done = python(f"{NAMES}; {DEFAULT}", checkout)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  csrc"))
    assert "it was not built" in line
    assert "pip install --no-build-isolation" in line
    assert done.stdout.splitlines()[-1] == "torch"
    assert "ValueError: backend 'csrc' cannot be used on cpu: it was not built" in done.stderr


def test_info_names_a_missing_compiler(checkout, tmp_path):
    done = python(NAMES, checkout, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "there is no C++ compiler here (apt install g++)" in done.stdout


def test_a_file_that_cannot_be_loaded(checkout, tmp_path):
    """A back end whose import fails as one built for another torch does."""
    shutil.copytree(checkout / "dpo_fast", tmp_path / "dpo_fast")
    shutil.copytree(checkout / "kernels", tmp_path / "kernels")
    (tmp_path / "dpo_fast" / "_csrc.abi3.so").write_bytes(b"no library")
    done = python(NAMES, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "it was built for another torch" in done.stdout


# ---- The source archive ----


def test_sdist_holds_what_a_build_needs(checkout, tmp_path):
    """Headers and kernels, which no list of sources names."""
    assert {"csrc/losses.h", "csrc/ops.cpp", "csrc/cpu/rows_kernel.h"} <= set(CSRC)
    arguments = ["sdist", "--dist-dir", str(tmp_path)]
    code = "import runpy, sys; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    done = python(code, checkout, *arguments)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    kernels = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {*CSRC, *kernels, "setup.py", "pyproject.toml", "LICENSE", "dpo_fast/backends/extension.py"} <= held
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc"))]
