"""The launchers of the compiled extension (csrc/), with the signatures of eager.py.

These functions call its ops, torch.ops.dpo_fast_csrc.*, of which the dispatcher takes the CPU's or CUDA's.
`blocks_per_sm` of the CUDA kernels is 3 or 1 for `dpo_fused`, and 2 or 1 for `residual_` (csrc/cuda says why).
"""

import importlib

import torch
from torch import Tensor

from .eager import OUTPUTS

_csrc = importlib.import_module("dpo_fast._csrc")

LOSS_IDS = {name: k for k, name in enumerate(_csrc.losses)}
WITH_CUDA = _csrc.cuda
WITH_THREADS = _csrc.threads  # whether it has OpenMP; without it the CPU computes one row after the other
TORCH_VERSION = _csrc.torch_version  # the version that it was compiled for
INSTRUCTION_SET = _csrc.instruction_set  # the one that runs on this processor: DEFAULT, AVX2 or AVX512

_ops = torch.ops.dpo_fast_csrc


def _named(statistics: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    rows = {name: statistics[OUTPUTS.index(name)] for name in outputs}
    return {name: row.bool() if name == "is_top1" else row for name, row in rows.items()}


def logps_fwd(logits, targets, *, ignore_index=-100, scale=1.0, softcap=None, temperature=1.0, outputs=()):
    logps, lse, stats = _ops.logps_fwd(logits, targets, ignore_index, scale, softcap, temperature, bool(outputs))
    return logps, lse, _named(stats, outputs)


def logps_bwd(logits, targets, lse, coef, *, ignore_index=-100, scale=1.0, softcap=None, temperature=1.0, out):
    _ops.logps_bwd(logits, targets, lse, coef, ignore_index, scale, softcap, temperature, out)
    return out


def residual_(
    logits, targets, *, ignore_index=-100, scale=1.0, softcap=None, temperature=1.0, outputs=(), blocks_per_sm=2
):
    options = ignore_index, scale, softcap, temperature, bool(outputs), blocks_per_sm
    logps, stats = _ops.residual_(logits, targets, *options)
    return logps, _named(stats, outputs)


def dpo_fused(
    logits,
    targets,
    cu_rows,
    ref_logps,
    grad_scale,
    *,
    loss_type,
    beta,
    label_smoothing,
    discopop_tau,
    simpo_gamma,
    ignore_index=-100,
    out,
    blocks_per_sm=3,
):
    assert not isinstance(grad_scale, Tensor), "grad_scale must be a number: reading a tensor would wait for its device"
    numbers = beta, label_smoothing, discopop_tau, simpo_gamma
    given = logits, targets, cu_rows, ref_logps, grad_scale
    losses, logps = _ops.dpo_fused(*given, LOSS_IDS[loss_type], *numbers, ignore_index, out, blocks_per_sm)
    return losses, logps, out


def scale_(x, factor):
    _ops.scale_(x, factor)
    return x


def new_empty(like, *size):
    return _ops.new_empty(like, size) if like.device.type == "cpu" else like.new_empty(size)
