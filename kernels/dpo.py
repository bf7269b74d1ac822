"""Loss and gradient of every pair from logits in one launch: 2 reads and 1 write of the scored rows.

    rows       logp[row] = x[target] - logsumexp(x)                             1 read
    pair       logps = sums over each sequence's rows; loss(logps) and its two derivatives
    gradient   out[row] = dloss/dlogps[sequence] * (onehot - softmax(x))        1 read, 1 write

The grid is persistent: a program takes the next ticket from one counter until there is none. Each row has a row ticket
and a gradient ticket. A row ticket stores its results and counts itself done; the one that completes the pair sums
them in row order (the same bits on every run), evaluates the loss and publishes two coefficients. A gradient ticket
waits for its pair's coefficients. They come from smaller tickets, and every program that holds a ticket is running, so
there is no deadlock, however many programs are resident, and no need for a cooperative launch.

The tickets come in this order: `lead` rows, then row and gradient tickets in turn, then the remaining gradients. `lead` is
the largest pair plus a lag of half a grid, so that a gradient ticket finds its pair done: without the lag every pair
would end with programs that wait for its last rows.

Data that one program writes and another reads is ordered by the pair's counter, an int32 in global memory. The writer
stores, then passes a barrier, then does an atomic add with release at gpu scope. The reader does an atomic add of 0 with
acquire (one `ld.acquire.gpu`), then passes a barrier, then loads past L1. One thread performs a scalar atomic; the barriers
(bar.sync) join the others to it, and release and acquire are cumulative: every thread of the reader sees afterwards what
any thread of the writer stored before. The row ticket that completes a pair does both (acq_rel): all writes of the counter
are read-modify-writes, so it follows the releases of all the pair's rows. Tickets carry no data, so taking one is relaxed.

The counters must be zero at the start: a memset of 4 (B + 1) bytes precedes the launch.
"""

import torch
import triton
import triton.language as tl

from .logps import check_rows
from .pair_losses import PAIR_LOSSES
from .rows import block_sizes, checked, reduce_row, row_layout, write_gradient, write_zeros

# Sizes of a program, by the number of programs per SM. Three of eight warps and 80 registers fit, and more would only
# wait for a place. One of 32 warps has fewer rows between their two reads, so that more second reads can come from L2.
# Neither choice has been measured yet.
PROGRAM_SIZES = {3: {"warps": 8, "loads": 4, "registers": 80}, 1: {"warps": 32, "loads": 2, "registers": 64}}


def program_count(device: torch.device, programs_per_sm: int) -> int:
    """Programs of the persistent grid. In the interpreter the first one takes all tickets in order and never waits."""
    if device.type != "cuda":
        return 2
    return programs_per_sm * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _sum_sequence(row_logps_ptr, targets_ptr, bounds_ptr, ignore_index, ROWS: tl.constexpr):
    """The sum of the log-probs of a sequence's scored rows, and the number of those rows (at least 1)."""
    # The bounds are loaded again here: keeping them since the ticket began would cost registers in the row loop.
    first, last = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
    # The sum is in float64 as in the other ops, so that equal models give equal numbers, with and without a gradient.
    logps = tl.zeros([ROWS], tl.float64)
    scored = tl.zeros([ROWS], tl.int32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = tl.load(targets_ptr + rows, mask=rows < last, other=ignore_index) != ignore_index
        logps += tl.load(row_logps_ptr + rows, mask=live, other=0.0, cache_modifier=".cg").to(tl.float64)
        scored += live.to(tl.int32)
    return tl.sum(logps, 0).to(tl.float32), tl.maximum(tl.sum(scored, 0), 1).to(tl.float32)


@triton.jit
def _finish_pair(
    pair, cu_ptr, row_logps_ptr, targets_ptr, ref_ptr, grad_scale, losses_ptr, logps_ptr, coef_ptr, B,
    ignore_index, beta, label_smoothing, tau, gamma,
    LOSS: tl.constexpr, HAS_REF: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Log-probs, loss and the two coefficients of a pair whose rows are done."""
    pw, nw = _sum_sequence(row_logps_ptr, targets_ptr, cu_ptr + pair, ignore_index, ROWS)
    pl, nl = _sum_sequence(row_logps_ptr, targets_ptr, cu_ptr + B + pair, ignore_index, ROWS)
    rw, rl = 0.0, 0.0
    if HAS_REF:
        rw, rl = tl.load(ref_ptr + pair).to(tl.float32), tl.load(ref_ptr + B + pair).to(tl.float32)
    loss, gw, gl = LOSS(pw, pl, rw, rl, nw, nl, beta, label_smoothing, tau, gamma)
    if SCALE_IS_TENSOR:
        grad_scale = tl.load(grad_scale).to(tl.float32)
    tl.store(losses_ptr + pair, loss)
    tl.store(logps_ptr + pair, pw)
    tl.store(logps_ptr + B + pair, pl)
    tl.store(coef_ptr + pair, gw * grad_scale)
    tl.store(coef_ptr + B + pair, gl * grad_scale)


@triton.jit
def _largest_pair(cu_ptr, B, THREADS: tl.constexpr):
    """The number of rows of the largest pair."""
    largest = tl.zeros([THREADS], tl.int32)
    for start in range(0, B, THREADS):
        pairs = start + tl.arange(0, THREADS)
        real = pairs < B
        chosen, rejected = cu_ptr + pairs, cu_ptr + B + pairs
        ends = tl.load(chosen + 1, mask=real, other=0) + tl.load(rejected + 1, mask=real, other=0)
        begins = tl.load(chosen, mask=real, other=0) + tl.load(rejected, mask=real, other=0)
        largest = tl.maximum(largest, ends - begins)
    return tl.max(largest, 0)


@triton.jit
def _pair_of(place, cu_ptr, B, split):
    """The pair that a place belongs to: the last one whose first place is not past it."""
    pair = place * 0
    end = pair + B
    while end - pair > 1:
        middle = pair + (end - pair) // 2
        first = tl.load(cu_ptr + middle) + (tl.load(cu_ptr + B + middle) - split) + middle
        pair, end = tl.where(first <= place, middle, pair), tl.where(first <= place, end, middle)
    return pair


@triton.jit(do_not_specialize=["stride_n", "stride_out", "N", "V", "B", "ignore_index"])
def _dpo_kernel(
    x_ptr, targets_ptr, cu_ptr, ref_ptr, grad_scale,
    out_ptr, losses_ptr, logps_ptr,
    top_ptr, log_total_ptr, row_logps_ptr, coef_ptr, counters_ptr,
    stride_n, stride_out, N, V, B, ignore_index, beta, label_smoothing, tau, gamma,
    LOSS: tl.constexpr, HAS_REF: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr,
    EDGES: tl.constexpr, OUT_ALIGNED: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    # Places are numbered pair by pair: its chosen rows, its rejected rows, and one place without a row, so that a pair
    # without rows is completed too.
    split = tl.load(cu_ptr + B)
    places = N + B
    lead = tl.minimum(_largest_pair(cu_ptr, B, THREADS) + 1 + (tl.num_programs(0) + 1) // 2, places)

    ticket = tl.atomic_add(counters_ptr + B, 1, sem="relaxed", scope="gpu")
    while ticket < 2 * places:
        turn = ticket - lead
        is_row = ticket < lead
        place = tl.where(is_row, ticket, ticket - places)
        if (turn >= 0) & (turn < 2 * (places - lead)):
            is_row = turn % 2 == 0
            place = tl.where(is_row, lead, 0) + turn // 2

        pair = _pair_of(place, cu_ptr, B, split)
        w0, w1 = tl.load(cu_ptr + pair), tl.load(cu_ptr + pair + 1)
        l0, l1 = tl.load(cu_ptr + B + pair), tl.load(cu_ptr + B + pair + 1)
        index = place - (w0 + (l0 - split) + pair)
        chosen, rejected = w1 - w0, l1 - l0
        is_chosen = index < chosen
        has_row = index < chosen + rejected
        row = tl.where(is_chosen, w0 + index, l0 + (index - chosen)).to(tl.int64)
        target = tl.load(targets_ptr + row, mask=has_row, other=ignore_index)
        counter = counters_ptr + pair

        if is_row:
            if target != ignore_index:
                start = row * stride_n
                target, fault = checked(target, V)
                picked = tl.load(x_ptr + start + target).to(tl.float32) + fault
                top, log_total, _, _, _ = reduce_row(
                    x_ptr, start, V, 1.0, 1.0, False, False, False, False, EDGES, VEC, K, THREADS
                )
                tl.store(top_ptr + row, top)
                tl.store(log_total_ptr + row, log_total)
                tl.store(row_logps_ptr + row, (picked - top) - log_total)
            tl.debug_barrier()
            done = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            tl.debug_barrier()
            if done == chosen + rejected:
                _finish_pair(
                    pair, cu_ptr, row_logps_ptr, targets_ptr, ref_ptr, grad_scale, losses_ptr, logps_ptr, coef_ptr, B,
                    ignore_index, beta, label_smoothing, tau, gamma,
                    LOSS, HAS_REF, SCALE_IS_TENSOR, THREADS,
                )  # fmt: skip
                tl.debug_barrier()
                tl.atomic_add(counter, 1, sem="release", scope="gpu")
        elif has_row:
            coef = 0.0
            if target != ignore_index:
                # The count of a finished pair: its rows, the place without a row, and the published coefficients.
                while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < chosen + rejected + 2:
                    pass
                tl.debug_barrier()
                coef = tl.load(coef_ptr + tl.where(is_chosen, pair, B + pair), cache_modifier=".cg")
            if coef != 0:
                # A target outside the vocabulary has already made the coefficient NaN.
                target, _ = checked(target, V)
                top = tl.load(top_ptr + row, cache_modifier=".cg")
                log_total = tl.load(log_total_ptr + row, cache_modifier=".cg")
                write_gradient(
                    x_ptr, row * stride_n, out_ptr, row * stride_out, V, target, coef, top, log_total, 1.0, 1.0, False,
                    EDGES, OUT_ALIGNED, VEC, K, THREADS,
                )  # fmt: skip
            else:
                write_zeros(out_ptr, row * stride_out, V, EDGES, VEC, K, THREADS)
        ticket = tl.atomic_add(counters_ptr + B, 1, sem="relaxed", scope="gpu")


def dpo_fused(
    logits, targets, cu_rows, ref_logps, grad_scale, *,
    loss_type, beta, label_smoothing, discopop_tau, simpo_gamma, ignore_index=-100, out, programs_per_sm=3,
):  # fmt: skip
    """Losses [B], log-probs [2B] (chosen, then rejected; float32) and the gradient `out` [N, V] of pairs of sequences.

    Sequence s has the rows cu_rows[s]:cu_rows[s + 1] of logits [N, V]; cu_rows is int32 [2B + 1] from 0 to N.
    `loss_type` is one of PAIR_LOSSES; `ref_logps` is [2B] or None. `out` is grad_scale (a float, or a tensor of one
    number) times d losses.sum() / d logits, in the type of logits; it may be `logits`. Rows whose target is
    `ignore_index` are not read and are zero in `out`. A target that is outside [0, V) and not ignored makes its pair NaN.
    `programs_per_sm` is a key of PROGRAM_SIZES.
    """
    check_rows(logits, targets)
    check_rows(out, targets)
    assert (out.shape, out.dtype) == (logits.shape, logits.dtype), (out.shape, out.dtype)
    N, V = logits.shape
    B = (cu_rows.numel() - 1) // 2
    assert (cu_rows.numel(), cu_rows.dtype) == (2 * B + 1, torch.int32), (cu_rows.shape, cu_rows.dtype)
    device = logits.device
    losses, logps, coef = (torch.empty(n, dtype=torch.float32, device=device) for n in (B, 2 * B, 2 * B))
    top, log_total, row_logps = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(3))
    counters = torch.zeros(B + 1, dtype=torch.int32, device=device)
    scale_is_tensor = isinstance(grad_scale, torch.Tensor)
    _dpo_kernel[(min(program_count(device, programs_per_sm), 2 * (N + B)),)](
        logits, targets, cu_rows, cu_rows if ref_logps is None else ref_logps,
        grad_scale if scale_is_tensor else float(grad_scale),
        out, losses, logps, top, log_total, row_logps, coef, counters,
        logits.stride(0), out.stride(0), N, V, B, ignore_index,
        float(beta), float(label_smoothing),
        float(discopop_tau), float(simpo_gamma),
        LOSS=PAIR_LOSSES[loss_type], HAS_REF=ref_logps is not None, SCALE_IS_TENSOR=scale_is_tensor,
        **row_layout(logits, out), **block_sizes(V, logits.dtype, **PROGRAM_SIZES[programs_per_sm]),
    )  # fmt: skip
    return losses, logps, out
