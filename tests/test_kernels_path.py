"""kernels/ is dpo_fast.kernels, in a checkout and installed, and never the top-level package of that name."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    """Output of a fresh interpreter that knows `path` and no other place of dpo_fast."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    start = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    command = [sys.executable, "-c", start + code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_package_shadows_kernels():
    assert FILES
    assert "__init__.py" not in FILES


def test_a_checkout(tmp_path):
    found = python("import dpo_fast.kernels.logps as m; print(m.__file__)", tmp_path, ROOT)
    assert Path(found) == ROOT / "kernels" / "logps.py"


def test_kernels_of_others_is_found_from_the_checkout(tmp_path):
    """transformers imports the PyPI package `kernels`: a regular package wins over our folder, wherever it is."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("CUDAProperties = 1\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r})\nfrom kernels import CUDAProperties; import dpo_fast.kernels.rows"
    python(code, ROOT, ROOT)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist of a copy of the checkout, by setuptools alone."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("dpo_fast", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = f"from setuptools import build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_wheel_and_sdist_hold_the_kernels(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if name.startswith("dpo_fast/kernels/")) == [
        f"dpo_fast/kernels/{name}" for name in FILES
    ]
    assert not [name for name in names if name.startswith("kernels/")]
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "dpo_fast").rglob("*.py")}
    assert ours <= set(names)
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"kernels/{name}" for name in FILES} <= held


def test_an_installed_wheel_uses_its_own(built, tmp_path):
    """And not a folder `kernels` that lies beside it, as in site-packages."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise SystemExit('not ours')\n")
    code = "import dpo_fast, dpo_fast.kernels.logps as m; print(m.__file__, len(dpo_fast.__path__))"
    found, count = python(code, tmp_path, tmp_path).split()
    assert Path(found) == tmp_path / "dpo_fast" / "kernels" / "logps.py"
    assert count == "1"
