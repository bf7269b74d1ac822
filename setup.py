"""Builds the extension of csrc/; everything else about the package is in pyproject.toml.

    pip install --no-build-isolation .        # torch must be there: an isolated build has none

Without torch or a C++ compiler the package installs without the extension and says so, here and in
`python -m dpo_fast.info`. With a torch for CUDA and its nvcc the CUDA kernels are built too.
"""

import platform
import sys
from pathlib import Path

from setuptools import setup

CSRC = Path("csrc")
# No a * b - c in one rounding unless it is asked for: the largest z minus itself is 0.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]
# Compiled for processors that not every machine has; csrc/cpu/ops_cpu.cpp chooses when it runs.
VECTORS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


def build() -> dict:
    try:
        from torch.utils import cpp_extension
    except ImportError:
        warn("torch cannot be imported here: install torch, then run pip with --no-build-isolation")
        return {}
    import torch

    with_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    vectors = {CSRC / f"cpu/rows_{name}.cpp": flags for name, flags in VECTORS.items()}
    sources = [CSRC / "ops.cpp", *(path for path in sorted(CSRC.glob("cpu/*.cpp")) if path not in vectors)]
    flags = {"cxx": FLAGS}
    kind = cpp_extension.CppExtension
    if with_cuda:
        sources += [*sorted(CSRC.glob("cuda/*.cpp")), *sorted(CSRC.glob("cuda/*.cu"))]
        flags["cxx"] = [*FLAGS, "-DDPO_FAST_CUDA"]
        flags["nvcc"] = ["-O3", "-lineinfo"]
        kind = cpp_extension.CUDAExtension
    elif torch.version.cuda is not None:
        warn("no CUDA toolkit (nvcc, CUDA_HOME): only its part for the processor is built; Triton runs on the GPU")

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                warn(f"{type(error).__name__}: {error}")
                self.extensions = []

        def build_extension(self, ext):
            if platform.machine() in ("x86_64", "AMD64"):
                for path, own in vectors.items():
                    where = {"output_dir": str(Path(self.build_temp) / path.stem), "include_dirs": ext.include_dirs}
                    args = {"cxx": [*FLAGS, *own], "nvcc": []}
                    ext.extra_objects += self.compiler.compile([str(path)], extra_postargs=args, **where)
            super().build_extension(ext)

    extension = kind("dpo_fast._csrc", [str(path) for path in sources], extra_compile_args=flags)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def warn(why: str) -> None:
    print(f"\n{'!' * 80}\ndpo_fast: the extension is not built. {why}\n{'!' * 80}\n", file=sys.stderr)


setup(**build())
