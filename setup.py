"""Builds the extension of csrc/; everything else about the package is in pyproject.toml.

    pip install --no-build-isolation .        # torch must be installed; an isolated build would not see it

Without torch or a C++ compiler the package installs without the extension. A message here, which pip shows with -v, and
`python -m dpo_fast.info` say so. With a torch for CUDA and its nvcc the CUDA kernels are built too.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

CSRC = Path("csrc")
# No a * b - c is rounded once unless the code asks for it, so that the largest z minus itself is 0.
# torch's headers have pragmas that only CUDA's compiler knows, and thousands of lines about them would hide an error.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-unknown-pragmas"]
# These files are compiled for instruction sets that not every machine has; csrc/cpu/ops_cpu.cpp chooses when it runs.
VECTORS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    # GCC 12 warns of its own intrinsics, hundreds of times.
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        "-Wno-maybe-uninitialized",
    ],
}
# These are built where no GPU can be asked; the second one's PTX also serves newer GPUs. Older ones need TORCH_CUDA_ARCH_LIST.
ARCHITECTURES = "8.0;9.0+PTX"


def cuda_home() -> str | None:
    """The CUDA toolkit of the nvcc on the PATH, where torch would look in a wrong place for it; otherwise None.

    torch takes the folder above nvcc's for the toolkit, but this nvcc may be a link or a script; nvcc itself knows its own place.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return None
    if (Path(nvcc).parent.parent / "include/cuda_runtime.h").exists():
        return None
    done = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return str(Path(top[1].strip()).resolve()) if top else None


def build() -> dict:
    if home := cuda_home():
        os.environ["CUDA_HOME"] = home
    try:
        from torch.utils import cpp_extension
    except ImportError:
        warn("not built", "torch cannot be imported here: install torch, then run pip with --no-build-isolation")
        return {}
    import torch

    vectors = {CSRC / f"cpu/rows_{name}.cpp": flags for name, flags in VECTORS.items()}
    x86 = platform.machine() in ("x86_64", "AMD64")
    nvcc = cpp_extension.CUDA_HOME is not None and Path(cpp_extension.CUDA_HOME, "bin", "nvcc").exists()
    if torch.version.cuda is not None and not nvcc:
        warn("built for the processor only", "there is no CUDA toolkit (nvcc, CUDA_HOME): Triton runs on the GPU")
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)

    def extension(cuda: bool, threads: bool):
        """The extension of `cpp_extension`. `threads` adds OpenMP, without which at::parallel_for runs on one thread here."""
        openmp = ["-fopenmp"] if threads else []
        flags = {"cxx": [*FLAGS, *openmp]}
        sources = [CSRC / "ops.cpp", *(path for path in sorted(CSRC.glob("cpu/*.cpp")) if path not in vectors)]
        if cuda:
            sources += [*sorted(CSRC.glob("cuda/*.cpp")), *sorted(CSRC.glob("cuda/*.cu"))]
            flags = {"cxx": [*flags["cxx"], "-DDPO_FAST_CUDA"], "nvcc": ["-O3", "-lineinfo"]}
        kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
        return kind("dpo_fast._csrc", list(map(str, sources)), extra_compile_args=flags, extra_link_args=openmp)

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            (ext,) = self.extensions
            cuda = torch.version.cuda is not None and nvcc
            # A build that fails with CUDA or OpenMP may succeed without; `python -m dpo_fast.info` says what is missing.
            for options in dict.fromkeys([(cuda, True), (False, True), (False, False)]):
                vars(ext).update(vars(extension(*options)))
                try:
                    super().build_extensions()
                    return
                except Exception as error:
                    tried = f"{'with' if options[0] else 'without'} CUDA, {'with' if options[1] else 'without'} OpenMP"
                    warn(f"not built {tried}", f"{type(error).__name__}: {error}")
            self.extensions = []

        def build_extension(self, ext):
            if x86:
                for path, own in vectors.items():
                    where = {"output_dir": str(Path(self.build_temp) / path.stem), "include_dirs": ext.include_dirs}
                    args = {"cxx": [*FLAGS, *own], "nvcc": []}
                    ext.extra_objects += self.compiler.compile([str(path)], extra_postargs=args, **where)
            super().build_extension(ext)

    return {"ext_modules": [extension(False, True)], "cmdclass": {"build_ext": Build}}


def warn(what: str, why: str) -> None:
    print(f"\n{'!' * 80}\ndpo_fast: the extension is {what}. {why}\n{'!' * 80}\n", file=sys.stderr)


setup(packages=[*find_packages(include=["dpo_fast*"]), "dpo_fast.kernels"], **build())
