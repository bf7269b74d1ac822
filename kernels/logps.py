"""Log-probs of targets from logits [N, V], their gradient, and both in one launch for a head's tile of logits.

    logps_fwd   logp = x[target] - logsumexp(x)                         1 read of the scored rows
    logps_bwd   out = coef * (onehot - softmax(x)) * dx/draw            1 read, 1 write
    residual_   logp, and the row becomes (onehot - softmax) * dx/draw  1 read from memory, 1 from L2, 1 write
    scale_      a gradient times the one number that backward() gets    nothing where it is 1, else 1 read, 1 write

One program works on one row (rows.py). Rows whose target is ignored, or whose coefficient is 0, are not read. A target
that is outside [0, V) and not ignored reads nothing outside its row; its log-prob and gradient are NaN.
Autograd is in ops/, the choice of a back end in backends/.
"""

import torch
import triton
import triton.language as tl

from .rows import block_sizes, checked, reduce_row, row_layout, row_transform, transform, write_gradient, write_zeros

OUTPUTS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def check_rows(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise ValueError for a type of logits [N, V] without kernels. Callers have checked the shapes, which are asserted."""
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"logits are {logits.dtype}: the Triton kernels take bfloat16, float16 or float32")
    assert (logits.ndim, targets.shape) == (2, logits.shape[:1]), (logits.shape, targets.shape)
    assert logits.stride(1) == 1 or logits.shape[1] == 1, logits.stride()
    assert targets.is_contiguous(), targets.stride()


@triton.jit
def _store_row(
    row, scored, picked, top, log_total, entropy, x_sum, log_sum_sq, V, temperature,
    logps_ptr, entropy_ptr, mean_ptr, top1_ptr, sum_sq_ptr,
    ENTROPY: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr,
):  # fmt: skip
    tl.store(logps_ptr + row, (picked - top) - log_total)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)
    if MEAN:
        tl.store(mean_ptr + row, x_sum * temperature / V)
    if TOP1:
        tl.store(top1_ptr + row, scored & (picked >= top))
    if SUM_SQ:
        tl.store(sum_sq_ptr + row, log_sum_sq)


@triton.jit(do_not_specialize=["stride_n", "V", "ignore_index"])
def _logps_fwd_kernel(
    x_ptr, targets_ptr,
    logps_ptr, lse_ptr, entropy_ptr, mean_ptr, top1_ptr, sum_sq_ptr,
    stride_n, V, ignore_index, a, cap, temperature,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr,
    EDGES: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * stride_n
    target = tl.load(targets_ptr + row)
    # An ignored row stores these zeros: x[target] = top = 0 and log_total = 0 make its log-prob 0.
    zero = 0.0
    picked, top, log_total, entropy, x_sum, log_sum_sq = zero, zero, zero, zero, zero, zero
    scored = target != ignore_index
    if scored:
        target, fault = checked(target, V)
        picked = transform(tl.load(x_ptr + start + target), a, cap, SOFTCAP) + fault
        top, log_total, entropy, x_sum, log_sum_sq = reduce_row(
            x_ptr, start, V, a, cap, SOFTCAP, ENTROPY, MEAN, SUM_SQ, EDGES, VEC, K, THREADS
        )
    tl.store(lse_ptr + row, top + log_total)
    _store_row(
        row, scored, picked, top, log_total, entropy, x_sum, log_sum_sq, V, temperature,
        logps_ptr, entropy_ptr, mean_ptr, top1_ptr, sum_sq_ptr, ENTROPY, MEAN, TOP1, SUM_SQ,
    )  # fmt: skip


def logps_fwd(logits, targets, *, ignore_index=-100, scale=1.0, softcap=None, temperature=1.0, outputs=()):
    """Log-probs [N], log-sum-exps [N] and the named statistics [N] of logits [N, V], float32 (is_top1: bool).

    Rows may have any stride. Rows whose target is `ignore_index` give 0 (False) everywhere.
    """
    check_rows(logits, targets)
    N, V = logits.shape
    logps, lse = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(2))
    stats = _statistics(N, logits.device, outputs)
    if N:
        blocks = block_sizes(V, logits.dtype, loads=_loads(outputs, softcap))
        _logps_fwd_kernel[(N,)](
            logits, targets, logps, lse, *(stats.get(name, logps) for name in OUTPUTS),
            logits.stride(0), V, ignore_index, temperature=float(temperature),
            **row_transform(scale, softcap, temperature), **_flags(outputs), **row_layout(logits), **blocks,
        )  # fmt: skip
    return logps, lse, stats


@triton.jit(do_not_specialize=["stride_n", "stride_out", "V", "ignore_index"])
def _logps_bwd_kernel(
    x_ptr, targets_ptr, lse_ptr, coef_ptr,
    out_ptr,
    stride_n, stride_out, V, ignore_index, a, cap,
    SOFTCAP: tl.constexpr,
    EDGES: tl.constexpr, OUT_ALIGNED: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    coef = tl.load(coef_ptr + row).to(tl.float32)
    if (target != ignore_index) & (coef != 0):
        target, fault = checked(target, V)
        lse = tl.load(lse_ptr + row)
        write_gradient(
            x_ptr, row * stride_n, out_ptr, row * stride_out, V, target, coef + fault, lse, 0.0, a, cap, SOFTCAP,
            EDGES, OUT_ALIGNED, VEC, K, THREADS,
        )  # fmt: skip
    else:
        write_zeros(out_ptr, row * stride_out, V, EDGES, VEC, K, THREADS)


def logps_bwd(
    logits, targets, lse, coef, *, ignore_index=-100, scale=1.0, softcap=None, temperature=1.0, out
) -> torch.Tensor:
    """out[n] = coef[n] * d logp[n] / d logits[n], [N, V]; `out` may be `logits`. Returns `out`.

    `lse` and `coef` are float32 [N]. Rows that are ignored or have a coefficient of 0 are not read, and their gradient is
    zero. The probabilities have a relative error of 6e-8 * |lse|, from the rounding of lse.
    """
    check_rows(logits, targets)
    check_rows(out, targets)
    assert (out.shape, out.dtype) == (logits.shape, logits.dtype), (out.shape, out.dtype)
    N, V = logits.shape
    if N:
        _logps_bwd_kernel[(N,)](
            logits, targets, lse, coef, out, logits.stride(0), out.stride(0), V, ignore_index,
            **row_transform(scale, softcap, temperature), **row_layout(logits, out),
            **block_sizes(V, logits.dtype, loads=_loads((), softcap)),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["stride_n", "V", "ignore_index"])
def _residual_kernel(
    x_ptr, targets_ptr,
    logps_ptr, entropy_ptr, mean_ptr, top1_ptr, sum_sq_ptr,
    stride_n, V, ignore_index, a, cap, temperature,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr,
    EDGES: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * stride_n
    target = tl.load(targets_ptr + row)
    zero = 0.0
    picked, top, log_total, entropy, x_sum, log_sum_sq = zero, zero, zero, zero, zero, zero
    scored = target != ignore_index
    if scored:
        target, fault = checked(target, V)
        picked = transform(tl.load(x_ptr + start + target), a, cap, SOFTCAP) + fault
        top, log_total, entropy, x_sum, log_sum_sq = reduce_row(
            x_ptr, start, V, a, cap, SOFTCAP, ENTROPY, MEAN, SUM_SQ, EDGES, VEC, K, THREADS
        )
        write_gradient(
            x_ptr, start, x_ptr, start, V, target, 1.0 + fault, top, log_total, a, cap, SOFTCAP,
            EDGES, True, VEC, K, THREADS,
        )  # fmt: skip
    else:
        write_zeros(x_ptr, start, V, EDGES, VEC, K, THREADS)
    _store_row(
        row, scored, picked, top, log_total, entropy, x_sum, log_sum_sq, V, temperature,
        logps_ptr, entropy_ptr, mean_ptr, top1_ptr, sum_sq_ptr, ENTROPY, MEAN, TOP1, SUM_SQ,
    )  # fmt: skip


def residual_(
    logits, targets, *, ignore_index=-100, scale=1.0, softcap=None, temperature=1.0, outputs=(), programs_per_sm=2
):
    """Log-probs [N] and statistics as in `logps_fwd`; each row of logits [N, V] is overwritten with d logp / d logits:
    (onehot - softmax) * scale / temperature * (1 - tanh^2), or zero where the target is ignored.

    `programs_per_sm` is 2 or 1. With 1, half as many rows are between their two reads at a time, and more of the second
    reads can come from L2. Neither choice has been measured yet.
    """
    check_rows(logits, targets)
    N, V = logits.shape
    logps = torch.empty(N, dtype=torch.float32, device=logits.device)
    stats = _statistics(N, logits.device, outputs)
    if N:
        # A tile of logits may have no more rows than a GPU has SMs; twice the warps per row then keep as many loads in
        # flight.
        if programs_per_sm == 2:
            blocks = block_sizes(V, logits.dtype, warps=16, loads=_loads(outputs, softcap))
        else:
            assert programs_per_sm == 1, programs_per_sm
            blocks = block_sizes(V, logits.dtype, warps=32, loads=2, registers=64)
        _residual_kernel[(N,)](
            logits, targets, logps, *(stats.get(name, logps) for name in OUTPUTS),
            logits.stride(0), V, ignore_index, temperature=float(temperature),
            **row_transform(scale, softcap, temperature), **_flags(outputs), **row_layout(logits), **blocks,
        )  # fmt: skip
    return logps, stats


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, parts, stride, length, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        blocks = tl.cdiv(length, BLOCK)
        for i in range(tl.program_id(0), parts * blocks, tl.num_programs(0)):
            part, block = i // blocks, i % blocks
            offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            at = x_ptr + part.to(tl.int64) * stride + offsets
            x = tl.load(at, mask=offsets < length, other=0.0)
            tl.store(at, (x.to(tl.float32) * factor).to(x.dtype), mask=offsets < length)


def scale_(x, factor):
    """x *= factor for a factor of one element on the device of x; only the factor is read where it is 1. Returns x.

    x must be contiguous, or each x[i] must be, or its rows must follow each other with equal gaps (`logits[..., :V]`).
    """
    if x.numel():
        x_parts, block = _as_parts(x), 8192
        parts, length = x_parts.shape
        # These are enough programs for 64 KB in flight per SM on the largest GPUs, and few to start where the factor is 1.
        programs = min(1024, parts * triton.cdiv(length, block))
        _scale_kernel[(programs,)](x, factor, parts, x_parts.stride(0), length, BLOCK=block, num_warps=8)
    return x


def _as_parts(x) -> torch.Tensor:
    """A view [parts, length] of x with parts as long as its strides allow."""
    if x.is_contiguous():
        return x.view(1, -1)
    return x.flatten(1) if x[0].is_contiguous() else x.view(-1, x.shape[-1])


def _statistics(N, device, outputs) -> dict[str, torch.Tensor]:
    dtypes = {"is_top1": torch.bool}
    return {name: torch.empty(N, dtype=dtypes.get(name, torch.float32), device=device) for name in outputs}


def _loads(outputs, softcap) -> int:
    # Statistics and soft-capping need registers: with four loads in flight per thread, code for sm_100 spills.
    return 2 if outputs or softcap is not None else 4


def _flags(outputs) -> dict[str, bool]:
    assert set(outputs) <= set(OUTPUTS), outputs
    return dict(zip(("ENTROPY", "MEAN", "TOP1", "SUM_SQ"), (name in outputs for name in OUTPUTS), strict=True))
