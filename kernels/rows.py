"""What the row kernels share: one program works on one row of logits, x [V], wherever it lies in memory.

A row is read in blocks of [K, THREADS, VEC] words: each thread holds K vectors of VEC words (16 bytes, one load). So its
running maximum and sums stay in its own registers, there is no barrier until the row ends, and the cost is one exponential
per word and one per block.

    word       x = raw * a, or cap * tanh(raw * a) with soft-capping; temperature and scale are in `a` and `cap`
    thread     m = max x, s = sum exp(x - m), and for the statistics sum exp(x - m) (x - m), sum exp(2 (x - m)), sum x
    row        top = max m, log_total = log sum s exp(m - top): kept apart, `x - top - log_total` keeps digits that
               `x - (top + log_total)` rounds away when the logits are far from zero
    gradient   coef * (onehot - exp(x - top - log_total)) * dx/draw

An odd V puts rows at odd addresses. Then only the words in whole 16-byte vectors go through blocks, and the few before and
after them (the edges) are added when the row ends. Without this every load of such a row would be two bytes wide.
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)


def block_sizes(V: int, dtype: torch.dtype, warps: int = 8, loads: int = 4, registers: int = 80) -> dict[str, int]:
    """Block sizes and launch options for rows of V words: at most `warps` warps per row, `loads` loads in flight and
    `registers` registers per thread.

    The numbers follow from counts of registers and loads; none has been measured on a GPU yet.
    """
    vec = 16 // dtype.itemsize
    # Threads past the end of the row would idle.
    while warps > 1 and loads * 32 * vec * warps > V:
        warps //= 2
    # 80 registers let three programs of eight warps share an SM: with four loads per thread 48 KB are in flight.
    # Without a limit, ptxas takes up to 126 for the kernel of dpo_fused.
    sizes = {"VEC": vec, "K": loads, "THREADS": 32 * warps, "num_warps": warps, "maxnreg": registers}
    # With fusion, `raw * a - top` is rounded once and is not 0 for the largest word, whose product was rounded for `top`.
    # Where words are bfloat16's lowest, that difference times the exponent's factor overflows, and inf * 0 is NaN.
    return {**sizes, "enable_fp_fusion": False}


def row_layout(x: torch.Tensor, out: torch.Tensor | None = None) -> dict[str, bool]:
    """EDGES: a row of x or out, both [N, V], can start or end inside a 16-byte vector. OUT_ALIGNED: x and out do so alike."""
    vec = 16 // x.element_size()
    strides = [t.stride(0) for t in (x, out) if t is not None]
    edges = any(n % vec for n in (x.shape[1], *strides))
    return {"EDGES": edges} if out is None else {"EDGES": edges, "OUT_ALIGNED": not edges or strides[0] == strides[1]}


def row_transform(scale: float, softcap: float | None, temperature: float) -> dict[str, float | bool]:
    """`a` and `cap` of the word formula above, for scale, soft-cap and temperature in this order."""
    if softcap is None:
        return {"a": float(scale / temperature), "cap": 1.0, "SOFTCAP": False}
    return {"a": float(scale / softcap), "cap": float(softcap / temperature), "SOFTCAP": True}


@triton.jit
def transform(raw, a, cap, SOFTCAP: tl.constexpr):
    """The transformed logits of raw words, in float32."""
    x = raw.to(tl.float32) * a
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1): exact at both infinities
        x = cap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))
    return x


@triton.jit
def checked(target, V):
    """A target as an address inside the row, and a term for its log-prob: 0, or NaN for a target outside [0, V)."""
    inside = (target >= 0) & (target < V)
    return tl.where(inside, target, 0), tl.where(inside, 0.0, float("nan"))


@triton.jit
def span(row_start, V, VEC: tl.constexpr, EDGES: tl.constexpr):
    """The offset of the first word in a whole vector, the number of words before it, and the number in whole vectors."""
    if EDGES:
        first = (row_start + (VEC - 1)) // VEC * VEC
        head = tl.minimum(first - row_start, V).to(tl.int32)
        return first, head, (V - head) // VEC * VEC
    else:
        return row_start // VEC * VEC, 0, V // VEC * VEC


@triton.jit
def edge_columns(head, body, VEC: tl.constexpr):
    """The columns before and after the whole vectors: [0, head) and [head + body, V); columns >= V must be masked."""
    i = tl.arange(0, 2 * VEC)
    return tl.where(i < head, i, i + body)


@triton.jit
def block_offsets(VEC: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr):
    """The offsets [K, THREADS, VEC] of the words of a block, from 0 to K * THREADS * VEC - 1."""
    loads, threads, words = tl.arange(0, K), tl.arange(0, THREADS), tl.arange(0, VEC)
    return (loads[:, None, None] * THREADS + threads[None, :, None]) * VEC + words[None, None, :]


@triton.jit
def _thread_sum(x):
    """The sum per thread, [K, THREADS, VEC] -> [THREADS]."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _add(x, m, s, ts, qs, xs, keep, ENTROPY: tl.constexpr, MEAN: tl.constexpr, SUM_SQ: tl.constexpr):
    """Add a block x to the threads' running values; x is -inf where `keep` is false."""
    m_new = tl.maximum(m, tl.max(tl.max(x, 2), 0))
    shifted = x - m_new[None, :, None]
    e = tl.exp2(shifted * LOG2E)
    alpha = tl.exp2((m - m_new) * LOG2E)
    if ENTROPY:
        # A masked word has e = 0 and shifted = -inf; a thread with masked words only has alpha = 0. Both products must be 0.
        ts = tl.where(alpha > 0, alpha * (ts + s * (m - m_new)), 0.0) + _thread_sum(tl.where(e > 0, e * shifted, 0.0))
    if SUM_SQ:
        qs = alpha * alpha * qs + _thread_sum(e * e)
    if MEAN:
        xs += _thread_sum(tl.where(keep, x, 0.0))
    return m_new, alpha * s + _thread_sum(e), ts, qs, xs


@triton.jit
def reduce_row(
    x_ptr, row_start, V, a, cap, SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, MEAN: tl.constexpr, SUM_SQ: tl.constexpr,
    EDGES: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Read a row once: its top, log_total, and (where asked for) entropy, sum of x, and log of the sum of p^2."""
    BLOCK: tl.constexpr = K * THREADS * VEC
    block = block_offsets(VEC, K, THREADS)
    m = tl.full([THREADS], LOWEST, tl.float32)
    s = tl.zeros([THREADS], tl.float32)
    ts, qs, xs = s, s, s
    first, head, body = span(row_start, V, VEC, EDGES)
    full = body // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x = transform(tl.load(x_ptr + first + (start + block)), a, cap, SOFTCAP)
        m, s, ts, qs, xs = _add(x, m, s, ts, qs, xs, True, ENTROPY, MEAN, SUM_SQ)
    if full < body:
        keep = full + block < body
        x = transform(tl.load(x_ptr + first + (full + block), mask=keep, other=0.0), a, cap, SOFTCAP)
        x = tl.where(keep, x, float("-inf"))
        m, s, ts, qs, xs = _add(x, m, s, ts, qs, xs, keep, ENTROPY, MEAN, SUM_SQ)
    top = tl.max(m, 0)
    if EDGES:
        columns = edge_columns(head, body, VEC)
        keep = columns < V
        x = transform(tl.load(x_ptr + row_start + columns, mask=keep, other=0.0), a, cap, SOFTCAP)
        x = tl.where(keep, x, float("-inf"))
        top = tl.maximum(top, tl.max(x, 0))
        shifted = x - top
        e = tl.exp2(shifted * LOG2E)
    down = m - top
    alpha = tl.exp2(down * LOG2E)
    total = tl.sum(alpha * s, 0)
    if EDGES:
        total += tl.sum(e, 0)
    log_total = tl.log(total)
    entropy, log_sum_sq, x_sum = log_total, log_total, log_total
    if ENTROPY:
        moment = tl.sum(tl.where(alpha > 0, alpha * (ts + s * down), 0.0), 0)
        if EDGES:
            moment += tl.sum(tl.where(e > 0, e * shifted, 0.0), 0)
        entropy = log_total - moment / total
    if SUM_SQ:
        squares = tl.sum(alpha * alpha * qs, 0)
        if EDGES:
            squares += tl.sum(e * e, 0)
        log_sum_sq = tl.log(squares) - 2.0 * log_total
    if MEAN:
        x_sum = tl.sum(xs, 0)
        if EDGES:
            x_sum += tl.sum(tl.where(keep, x, 0.0), 0)
    return top, log_total, entropy, x_sum, log_sum_sq


@triton.jit
def _slope(raw, hit, coef, top, log2_total, a, cap, SOFTCAP: tl.constexpr):
    """coef * (hit - p) * (1 - tanh^2) of a word; hit is 1 for the target and 0 for all other words."""
    x = transform(raw, a, cap, SOFTCAP)
    g = coef * (hit - tl.exp2((x - top) * LOG2E - log2_total))
    if SOFTCAP:
        tanh = x / cap
        g *= 1.0 - tanh * tanh
    return g


@triton.jit
def write_gradient(
    x_ptr, row_start, out_ptr, out_start, V, target, coef, top, log_total, a, cap, SOFTCAP: tl.constexpr,
    EDGES: tl.constexpr, OUT_ALIGNED: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Read a row once and write coef * d log p[target] / d raw. `out` may be the row itself."""
    BLOCK: tl.constexpr = K * THREADS * VEC
    block = block_offsets(VEC, K, THREADS)
    coef = coef * (a * cap)
    log2_total = log_total * LOG2E
    dtype = out_ptr.dtype.element_ty
    at_target = _slope(tl.load(x_ptr + row_start + target), 1.0, coef, top, log2_total, a, cap, SOFTCAP)
    # In place, no thread may write before all have read their target.
    tl.debug_barrier()
    first, head, body = span(row_start, V, VEC, EDGES)
    out_first = out_start + head
    if OUT_ALIGNED:
        # This changes no value; it tells the compiler that the address is aligned.
        out_first = out_first // VEC * VEC
    full = body // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        raw = tl.load(x_ptr + first + (start + block))
        g = _slope(raw, 0.0, coef, top, log2_total, a, cap, SOFTCAP)
        tl.store(out_ptr + out_first + (start + block), g.to(dtype))
    if full < body:
        keep = full + block < body
        raw = tl.load(x_ptr + first + (full + block), mask=keep, other=0.0)
        g = _slope(raw, 0.0, coef, top, log2_total, a, cap, SOFTCAP)
        tl.store(out_ptr + out_first + (full + block), g.to(dtype), mask=keep)
    if EDGES:
        columns = edge_columns(head, body, VEC)
        raw = tl.load(x_ptr + row_start + columns, mask=columns < V, other=0.0)
        g = _slope(raw, 0.0, coef, top, log2_total, a, cap, SOFTCAP)
        tl.store(out_ptr + out_start + columns, g.to(dtype), mask=columns < V)
    # Another thread wrote the target's word above, so it is overwritten here: comparing every word would cost half as much
    # again.
    tl.debug_barrier()
    tl.store(out_ptr + out_start + target, at_target.to(dtype))


@triton.jit
def write_zeros(out_ptr, out_start, V, EDGES: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr):
    """Write zeros to a row."""
    BLOCK: tl.constexpr = K * THREADS * VEC
    block = block_offsets(VEC, K, THREADS)
    dtype = out_ptr.dtype.element_ty
    first, head, body = span(out_start, V, VEC, EDGES)
    for start in range(0, body, BLOCK):
        tl.store(out_ptr + first + (start + block), tl.zeros([K, THREADS, VEC], dtype), mask=start + block < body)
    if EDGES:
        columns = edge_columns(head, body, VEC)
        tl.store(out_ptr + out_start + columns, tl.zeros([2 * VEC], dtype), mask=columns < V)
