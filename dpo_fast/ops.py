"""The head and the log-probs of target tokens in one op that never holds the whole [N, V] logits.

The gradient of a log-prob with respect to its logits is `onehot - softmax`, times one number a row that the loss decides
later. A row scale commutes with both matrix products of the backward pass, so the products can start before it is known:

    frozen head      2 GEMMs: logits, then dH = (onehot - softmax) W, kept unscaled until backward multiplies its rows
    trainable head   3 GEMMs: logits, dH and dW from `onehot - softmax` kept in a bounded workspace
                     4 GEMMs for the rows past the workspace: their logits are computed again
"""

import torch
from torch.autograd.function import once_differentiable

from . import reference

# Of the head; the fastest that is there is the default.
BACKENDS = ("torch",)
# Logits of one chunk of rows: on a CPU about what the last-level cache holds.
TILE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
WORKSPACE_BYTES = 1 << 30

_STATISTICS = reference.OUTPUTS


def linear_token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
    workspace_bytes: int = WORKSPACE_BYTES,
) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-prob of each target under a linear head: `F.linear(hidden, weight, bias).log_softmax(-1)[arange(N), targets]`.

    hidden [N, D], weight [V, D], targets [N] int64, bias [V]. The logits are multiplied by `logit_scale`, soft-capped
    (`softcap * tanh(x / softcap)`) and divided by `temperature`, in that order. Returns [N] in float32 (float64 for
    float64 input), in nats; with `outputs`, also a dict of the named statistics [N], which carry no gradient: `entropy`
    (nats), `mean_logits` (over the vocabulary, before the temperature), `is_top1`, `log_sum_sq_probs`.
    `workspace_bytes` bounds what is kept for backward when the head is trained; past it logits are computed again.
    Under autocast the head runs in autocast's type, as `nn.Linear` does.
    Raises ValueError for shapes that do not fit, an unknown output, or (on the CPU) a target outside [0, V).
    """
    _check(hidden, weight, targets, bias, softcap, temperature, outputs)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}: cast one of them")
    if not torch.is_grad_enabled():
        # autograd.Function asks what requires a gradient, not whether one will be taken: nothing is to be kept.
        hidden, weight, bias = (None if x is None else x.detach() for x in (hidden, weight, bias))
    # What follows the head's products is float32: autocast would run the statistics in its own type.
    with torch.autocast(device, enabled=False):
        logps, *stats = _LinearTokenLogps.apply(
            hidden, weight, targets, bias, (logit_scale, softcap, temperature), tuple(outputs), workspace_bytes
        )
    return (logps, dict(zip(outputs, stats, strict=True))) if outputs else logps


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, transform, outputs, workspace_bytes):
        n, v = hidden.shape[0], weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(n, dtype=wide, device=hidden.device)
        stats = {name: torch.empty(n, dtype=wide, device=hidden.device) for name in outputs}
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        trained = needs_weight or needs_bias
        # Rows whose residual `softmax - onehot` is kept for backward; a frozen head needs none of it.
        kept = min(n, workspace_bytes // (v * hidden.element_size())) if trained else 0
        residual = hidden.new_empty(kept, v)
        dh = torch.empty_like(hidden) if needs_hidden and not trained else None
        for a, b in chunks(n, v, wide, hidden.device.type, kept):
            tile = _row_pass(hidden[a:b], weight, targets[a:b], bias, transform)
            logps[a:b] = tile.logps
            for name in outputs:
                stats[name][a:b] = tile.statistic(name, hidden[a:b], weight, bias)
            if dh is not None:
                torch.mm(tile.residual(hidden.dtype), weight, out=dh[a:b])
            elif b <= kept:
                residual[a:b] = tile.residual(hidden.dtype)
        ctx.transform, ctx.kept = transform, kept
        ctx.save_for_backward(hidden, weight, targets, bias, residual, dh)
        if "is_top1" in stats:
            stats["is_top1"] = stats["is_top1"].bool()
        ctx.mark_non_differentiable(*stats.values())
        return logps, *stats.values()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        hidden, weight, targets, bias, residual, dh = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        scale = -grad[:, None]  # the residual is softmax - onehot
        if dh is not None:
            return (dh * scale).to(hidden.dtype), *[None] * 6
        n, v = hidden.shape[0], weight.shape[0]
        out_h = torch.empty_like(hidden) if needs_hidden else None
        dw = db = None
        # The kept rows are one chunk: their product is accumulated inside one GEMM and rounded once.
        rest = [(a + ctx.kept, b + ctx.kept) for a, b in chunks(n - ctx.kept, v, grad.dtype, hidden.device.type)]
        for a, b in ([] if rest and not ctx.kept else [(0, ctx.kept)]) + rest:
            if b <= ctx.kept:
                g = residual
            else:
                g = _row_pass(hidden[a:b], weight, targets[a:b], bias, ctx.transform).residual(hidden.dtype)
            if needs_hidden:
                out_h[a:b] = torch.mm(g, weight) * scale[a:b]
            if needs_weight:
                part = torch.mm(g.t(), (hidden[a:b] * scale[a:b]).to(hidden.dtype))
                # Several chunks add up in float32: rounding every sum to bf16 would bias training.
                dw = part if not rest else (part.to(grad.dtype) if dw is None else dw.add_(part))
            if needs_bias:
                db = grad.new_zeros(v) if db is None else db
                for i, j in chunks(b - a, v, grad.dtype, hidden.device.type):
                    db += (g[i:j] * scale[a + i : a + j]).sum(0)
        dw = None if dw is None else dw.to(weight.dtype)
        return out_h, dw, None, None if db is None else db.to(bias.dtype), None, None, None


class _row_pass:  # noqa: N801 - a function that keeps its tile
    """Logits of a chunk of rows and what is read off them."""

    def __init__(self, hidden, weight, targets, bias, transform):
        self.targets, (self.scale, self.softcap, self.temperature) = targets, transform
        wide = torch.promote_types(hidden.dtype, torch.float32)
        raw = torch.nn.functional.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
        self.capped = None
        logits = reference.transform_logits(raw.to(wide), self.scale, self.softcap)
        if self.softcap is not None:
            self.capped = logits / self.softcap
        if self.temperature != 1.0:
            logits = logits / self.temperature
        self.log_probs = torch.log_softmax(logits, dim=-1)
        self.mean_logits = logits.mean(-1) * self.temperature if self.softcap is not None else None
        self.logps = self.log_probs.gather(-1, targets[:, None])[:, 0]
        self.probs = None

    def _probs(self):
        if self.probs is None:
            self.probs = self.log_probs.exp()
        return self.probs

    def statistic(self, name, hidden, weight, bias):
        if name == "entropy":
            # A masked word has log-prob -inf and probability 0; their product is 0.
            floor = torch.finfo(self.log_probs.dtype).min
            return -torch.linalg.vecdot(self._probs(), self.log_probs.clamp_min_(floor))
        if name == "is_top1":
            return self.logps >= self.log_probs.amax(-1)
        if name == "log_sum_sq_probs":
            return torch.linalg.vecdot(self._probs(), self._probs()).log()
        if self.softcap is not None:
            return self.mean_logits
        # The mean over the vocabulary is linear in the weights: one matrix-vector product instead of a pass.
        wide = self.logps.dtype
        mean = hidden.to(wide) @ weight.mean(0, dtype=wide)
        return (mean if bias is None else mean + bias.to(wide).mean()) * self.scale

    def residual(self, dtype):
        """`d(-logps) / d(raw logits)`, [rows, V] in the matrix products' type."""
        g = self._probs()
        g[torch.arange(len(g), device=g.device), self.targets] -= 1
        self.probs = None
        if self.softcap is not None:
            g = g * (1 - self.capped**2)
        factor = self.scale / self.temperature
        return (g if factor == 1.0 else g.mul_(factor)).to(dtype)


def chunks(n: int, v: int, dtype: torch.dtype, device: str, boundary: int = 0) -> list[tuple[int, int]]:
    """Row ranges whose [rows, V] tile fits TILE_BYTES, none across `boundary`."""
    rows = max(1, TILE_BYTES.get(device, TILE_BYTES["cuda"]) // (v * dtype.itemsize))
    parts = []
    for start, end in ((0, min(boundary, n)), (min(boundary, n), n)):
        parts += [(a, min(a + rows, end)) for a in range(start, end, rows)]
    return parts


def _check(hidden, weight, targets, bias, softcap, temperature, outputs) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{hidden.shape[0]}], got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    unknown = set(outputs) - set(_STATISTICS)
    if unknown:
        raise ValueError(f"outputs {sorted(unknown)} are not among {', '.join(_STATISTICS)}")
    if not targets.is_cuda and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"targets lie in [{low}, {high}], outside the vocabulary [0, {weight.shape[0]})")
