"""Every Triton kernel, at every configuration in use, compiles to machine code for sm_80, sm_90 and sm_100 without a GPU.

The launchers run on `meta` tensors of real size under a driver that names a GPU which is not there, and every launch is
turned into a compilation. `pytest -s` prints the table of registers and shared memory.
"""

import os
import re
import subprocess
import time

import pytest
import torch
from kernel_tools import PLAIN

triton = pytest.importorskip("triton", reason="no triton on this machine")
from dpo_fast.kernels import dpo, logps  # noqa: E402
from dpo_fast.kernels.pair_losses import PAIR_LOSSES  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

CAPPED = {"scale": 1.0, "softcap": 30.0, "temperature": 1.0}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The rows of a large vocabulary, aligned and not (151665: Qwen's words without padding), and of a small one.
VOCABULARIES = (128256, 151665, 1000)
N, B = 4096, 16
# Fused multiply-adds of one tl.log, which is libdevice's polynomial.
LOG_FMAS = 13


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def batch(v, dtype):
    return meta(N, v, dtype=TYPES[dtype]), meta(N, dtype=torch.int64)


def forward(v, dtype, outputs=(), transform=PLAIN):
    logps.logps_fwd(*batch(v, dtype), ignore_index=-100, outputs=outputs, **transform)


def backward(v, dtype, transform=PLAIN):
    x, targets = batch(v, dtype)
    logps.logps_bwd(x, targets, meta(N), meta(N), ignore_index=-100, out=x, **transform)


def residual(v, dtype, outputs=(), transform=PLAIN, **options):
    logps.residual_(*batch(v, dtype), outputs=outputs, **transform, **options)


def fused(v, dtype, loss_type="sigmoid", grad_scale=1.0, count=B, **options):
    x, targets = batch(v, dtype)
    ref = None if loss_type == "simpo" else meta(2 * count)
    dpo.dpo_fused(
        x, targets, meta(2 * count + 1, dtype=torch.int32), ref, grad_scale, loss_type=loss_type, beta=0.1,
        label_smoothing=0.0, discopop_tau=0.05, simpo_gamma=0.5, ignore_index=-100, out=x, **options,
    )  # fmt: skip


def cases(arch):
    # fp16 and bf16 differ in two conversions: one vocabulary is enough for fp16, one type for a small vocabulary, and one
    # architecture for both.
    chosen = (
        (("bf16", "fp16", "fp32"), ("bf16", "fp32"), ("bf16",)) if arch == 90 else (("bf16", "fp32"), ("bf16",), ())
    )
    for v, types in zip(VOCABULARIES, chosen, strict=True):
        for dtype in types:
            yield f"logps_fwd {v} {dtype}", lambda v=v, t=dtype: forward(v, t)
            yield f"logps_fwd {v} {dtype} all outputs", lambda v=v, t=dtype: forward(v, t, logps.OUTPUTS)
            yield f"logps_bwd {v} {dtype}", lambda v=v, t=dtype: backward(v, t)
            yield f"residual_ {v} {dtype}", lambda v=v, t=dtype: residual(v, t)
            yield f"residual_ {v} {dtype} all outputs", lambda v=v, t=dtype: residual(v, t, logps.OUTPUTS)
            yield f"dpo_fused {v} {dtype}", lambda v=v, t=dtype: fused(v, t)
            if dtype != "fp16" and v > 1000:
                one = {"programs_per_sm": 1}
                yield f"residual_ {v} {dtype} one per SM", lambda v=v, t=dtype, one=one: residual(v, t, **one)
                yield f"dpo_fused {v} {dtype} one per SM", lambda v=v, t=dtype, one=one: fused(v, t, **one)
    for count in (8192, 65536):
        yield f"dpo_fused {count} pairs", lambda count=count: fused(VOCABULARIES[0], "bf16", count=count)
    v = VOCABULARIES[1]
    yield f"logps_fwd {v} bf16 softcap", lambda: forward(v, "bf16", (), CAPPED)
    yield f"logps_fwd {v} bf16 softcap all outputs", lambda: forward(v, "bf16", logps.OUTPUTS, CAPPED)
    yield f"logps_bwd {v} bf16 softcap", lambda: backward(v, "bf16", CAPPED)
    yield f"residual_ {v} bf16 softcap", lambda: residual(v, "bf16", (), CAPPED)
    yield f"residual_ {v} bf16 softcap all outputs", lambda: residual(v, "bf16", logps.OUTPUTS, CAPPED)
    for dtype in TYPES:
        yield f"scale_ {dtype}", lambda t=dtype: logps.scale_(meta(N, 1000, dtype=TYPES[t]), meta(1))
    # A loss is a few scalar instructions per pair: every one on one architecture.
    for name in PAIR_LOSSES if arch == 90 else ("discopop",):
        yield f"dpo_fused {v} bf16 {name}", lambda name=name: fused(v, "bf16", name, meta(()))


class AbsentGpu:
    """What the launcher asks of a driver: which device, which stream, which target."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


@pytest.fixture
def compiled(monkeypatch):
    """Launches compile for the active target, and what they compiled is listed."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    before = driver._active
    yield kernels
    driver._active = before


def dump(kernel, path, option):
    path.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout


def resources(kernel, path):
    text = dump(kernel, path, "-res-usage")
    return {name: int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}


def contracted(kernel, path, machine_code):
    """Whether a product and a sum of ours became one instruction with one rounding: `x - top` of the largest word x
    must be 0, so that a row of bfloat16's lowest words gives no NaN. The assembler is told the same as the compiler:
    its `machine_code` takes long to print and is read for one vocabulary."""
    most = LOG_FMAS * len(re.findall(r"\bmath\.log\b", kernel.asm["ttir"]))
    texts = [(r"\bfma\b", kernel.asm["ptx"])]
    if machine_code:
        texts.append((r"\bFFMA\b", dump(kernel, path, "-sass")))
    return any(len(re.findall(instruction, text)) > most for instruction, text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_kernel_spills_or_contracts(arch, compiled, tmp_path):
    """No registers in local memory, no contraction, and rows are read (and written) 16 bytes at a time, whatever their
    alignment."""
    if arch == 100 and tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 7):
        pytest.skip("triton 3.6's assembler for sm_100 spills up to 8 registers once a row in the one launch")
    driver.set_active(AbsentGpu(arch))
    table, spilled, narrow, fused_adds = [], [], [], []
    for name, launch in cases(arch):
        begin = time.perf_counter()
        launch()
        kernel = compiled[-1]
        use = resources(kernel, tmp_path / "kernel.cubin")
        row = f"sm_{arch} {name:45s} warps {kernel.metadata.num_warps:2d}  registers {use['REG']:3d}  "
        row += f"shared {kernel.metadata.shared:5d} B  stack {use['STACK']} B  ({time.perf_counter() - begin:.1f} s)"
        table.append(row)
        if use["STACK"] or use["LOCAL"]:
            spilled.append(row)
        if contracted(kernel, tmp_path / "kernel.cubin", f" {VOCABULARIES[1]} " in name):
            fused_adds.append(row)
        wide = ("ld.global.v4.b32",) if "fwd" in name else ("ld.global.v4.b32", "st.global.v4.b32")
        if not all(instruction in kernel.asm["ptx"] for instruction in wide):
            narrow.append(row)
    print("\n" + "\n".join(table))
    assert not spilled, "\n".join(spilled)
    assert not narrow, "\n".join(narrow)
    assert not fused_adds, "\n".join(fused_adds)
