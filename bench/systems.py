"""Who is measured: dpo_fast, plain torch and the peers, and the check that precedes every measurement.

A system is a row of SYSTEMS: a loader that returns one function per op of ops.py, or raises _MissingError with what to
install. `run` takes any of them through the same steps.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import dpo_fast
from bench.ops import BETA, COMPILED, OPS, Batch
from dpo_fast.backends import BACKENDS, resolve

FLOORS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}  # an error may be twice plain torch's own plus this


# ---- Plain torch ----


def plain_token_logps(logits, targets):
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scored = targets != -100
    picked = wide.log_softmax(-1).gather(-1, targets.masked_fill(~scored, 0)[..., None])[..., 0]
    return torch.where(scored, picked, 0)


def plain_loss(logps):
    """The sigmoid loss without a reference, from log-probs of sequences [2B]."""
    chosen, rejected = logps.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def plain_linear_token_logps(hidden, weight, targets):
    return plain_token_logps(F.linear(hidden, weight), targets)


def _packed_loss(token_logps: Callable) -> Callable:
    """A linear_dpo_loss made of a system's own token log-probs."""

    def loss(hidden, weight, targets, segments, count):
        logps = token_logps(hidden, weight, targets)
        logps = logps.to(torch.promote_types(logps.dtype, torch.float32))
        return plain_loss(logps.new_zeros(count).index_add(0, segments, logps))

    return loss


def _functions(wrap: Callable = lambda f: f) -> dict[str, Callable[[Batch], Tensor]]:
    token = wrap(plain_token_logps)
    sequence = wrap(lambda logits, targets: plain_token_logps(logits, targets).sum(-1))
    loss = wrap(lambda logits, targets: plain_loss(plain_token_logps(logits, targets).sum(-1)))
    return {
        "token_logps": lambda b: token(b.logits, b.targets),
        "sequence_logps": lambda b: sequence(b.logits, b.targets),
        "dpo_loss": lambda b: loss(b.logits, b.targets),
        **_head_functions(wrap(plain_linear_token_logps), wrap(_packed_loss(plain_linear_token_logps))),
    }


def _head_functions(token_logps: Callable, loss: Callable | None = None) -> dict[str, Callable[[Batch], Tensor]]:
    loss = loss or _packed_loss(token_logps)
    return {
        "linear_token_logps": lambda b: token_logps(b.hidden, b.weight, b.live_targets),
        "linear_dpo_loss": lambda b: loss(b.hidden, b.weight, b.live_targets, b.segments, len(b.targets)),
    }


# ---- dpo_fast and the peers ----


class _MissingError(Exception):
    """A system cannot be measured here; the message says why and how to get it."""


def _dpo_fast(device: str, backend: str, variant: str = "") -> dict[str, Callable[[Batch], Tensor]]:
    try:
        resolve(backend, device)
    except ValueError as error:
        raise _MissingError(str(error)) from error
    if backend == "triton" and device == "cpu":
        raise _MissingError("Triton on a CPU is its interpreter, whose time means nothing")
    loss = {"beta": BETA, "backend": backend}
    if variant == "inplace":
        return {"dpo_loss": lambda b: dpo_fast.dpo_loss(b.logits, b.targets, inplace=True, **loss).loss}
    if variant == "two launches":
        # The one launch knows no pair weights, so these force two launches; a weight of 1 changes no number.
        def two_launches(b):
            weights = torch.ones(len(b.targets) // 2, device=b.targets.device)
            return dpo_fast.dpo_loss(b.logits, b.targets, pair_weights=weights, **loss).loss

        return {"dpo_loss": two_launches}
    return {
        "token_logps": lambda b: dpo_fast.token_logps(b.logits, b.targets, backend=backend),
        "sequence_logps": lambda b: dpo_fast.sequence_logps(b.logits, b.targets, backend=backend),
        "dpo_loss": lambda b: dpo_fast.dpo_loss(b.logits, b.targets, **loss).loss,
        "linear_token_logps": lambda b: dpo_fast.linear_token_logps(
            b.hidden, b.weight, b.live_targets, backend=backend
        ),
        "linear_dpo_loss": lambda b: (
            dpo_fast.linear_dpo_loss(b.hidden, b.weight, b.live_targets, cu_seqlens=b.cu_seqlens, **loss).loss
        ),
    }


@functools.cache
def _compiler_works(device: str) -> bool:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception:  # inductor has no common type for "there is no compiler"
        return False
    return True


def _compiled(device: str) -> dict[str, Callable[[Batch], Tensor]]:
    if not _compiler_works(device):
        raise _MissingError("torch.compile needs a working C++ compiler here: apt-get install g++")
    return _functions(functools.partial(torch.compile, dynamic=False))


def _trl(device: str) -> dict[str, Callable[[Batch], Tensor]]:
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError as error:
        raise _MissingError(f"{error}: pip install trl==1.16.0") from error
    # TRL's DPO trainer asks for this chunk size too.
    return _head_functions(lambda h, w, t: ChunkedLogProbFunction.apply(h, w, None, t, 1.0, 32768, None, 1.0, ())[0])


def _liger(device: str) -> dict[str, Callable[[Batch], Tensor]]:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise _MissingError(f"{error}: pip install liger-kernel==0.8.5") from error
    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=_compiler_works(device))
    return {"linear_dpo_loss": lambda b: loss(b.weight, b.padded, b.targets)[0]}


def _cut_cross_entropy(device: str) -> dict[str, Callable[[Batch], Tensor]]:
    if device == "cpu":
        raise _MissingError("its kernels need a GPU")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise _MissingError(f"{error}: pip install cut-cross-entropy==25.1.1") from error
    return _head_functions(lambda h, w, t: -linear_cross_entropy(h, w, t, reduction="none"))


class _BareProducts(torch.autograd.Function):
    """The matrix products that a head cannot avoid, and nothing else; it is a floor and computes no loss."""

    @staticmethod
    def forward(ctx, hidden, weight):
        logits = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, logits = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return logits @ weight if needs[0] else None, logits.T @ hidden if needs[1] else None


def _bare_products(device: str) -> dict[str, Callable[[Batch], Tensor]]:
    return dict.fromkeys(("linear_token_logps", "linear_dpo_loss"), lambda b: _BareProducts.apply(b.hidden, b.weight))


def _torch_linear(device: str) -> dict[str, Callable[[Batch], Tensor]]:
    if not hasattr(F, "linear_cross_entropy"):
        raise _MissingError("F.linear_cross_entropy came with torch 2.13: pip install -U torch")
    options = torch.nn.LinearCrossEntropyOptions()
    return _head_functions(
        lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none", ignore_index=-100, options=options)
    )


@dataclasses.dataclass(frozen=True)
class System:
    """A loader: device -> one function per op. `ours` must have small errors (FLOORS), peers must compute the same function."""

    load: Callable[[str], dict[str, Callable[[Batch], Tensor]]]
    ours: bool = False
    hidden: str = "hidden"  # or "padded", which has the prompt rows too
    destroys: bool = False  # whether it overwrites the logits
    checked: bool = True  # whether it computes the op, and not only a part of its work
    note: str = ""


SYSTEMS = {
    **{
        f"dpo_fast {name}": System(functools.partial(_dpo_fast, backend=name), ours=True) for name in reversed(BACKENDS)
    },
    **{
        f"dpo_fast {name}, inplace": System(
            functools.partial(_dpo_fast, backend=name, variant="inplace"), ours=True, destroys=True
        )
        for name in reversed(BACKENDS)
    },
    # Plain torch has no single launch.
    **{
        f"dpo_fast {name}, two launches": System(
            functools.partial(_dpo_fast, backend=name, variant="two launches"), ours=True
        )
        for name in reversed(BACKENDS)
        if name != "torch"
    },
    "bare GEMMs": System(_bare_products, checked=False, note="the op's matrix products alone"),
    "torch eager": System(lambda device: _functions()),
    "torch.compile": System(_compiled),
    "TRL ChunkedLogProb": System(_trl),
    "Liger fused DPO": System(_liger, hidden="padded", note="prompt rows go through its head too"),
    "Cut Cross Entropy": System(_cut_cross_entropy, note="leaves out small gradients"),
    "F.linear_cross_entropy": System(_torch_linear),
}


def offers(system: str, op: str) -> bool:
    """Whether `system` has `op`; answered without importing the system."""
    function = OPS[op].function
    if system.endswith(("inplace", "two launches")):
        return function == "dpo_loss"
    if system == "Liger fused DPO":
        return function == "linear_dpo_loss"
    if system == "bare GEMMs":
        return function.startswith("linear")
    if system == "torch.compile":
        return op in COMPILED
    return function.startswith("linear") or system.startswith(("dpo_fast", "torch"))


@functools.cache
def load(system: str, device: str) -> dict[str, Callable[[Batch], Tensor]] | str:
    """The functions of a system, or the reason why there are none."""
    try:
        return SYSTEMS[system].load(device)
    except _MissingError as error:
        return str(error)


def inputs_of(system: str, op: str) -> tuple[str, ...]:
    """The names of the tensors whose gradient is a part of `op`."""
    return tuple(SYSTEMS[system].hidden if name == "hidden" else name for name in OPS[op].grads)


def run(function: Callable[[Batch], Tensor], batch: Batch, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The value of `function` and the gradients of the tensors `names`."""
    if not names:
        with torch.no_grad():
            return (function(batch),)
    value = function(batch)
    upstream = batch.upstream.to(value.dtype) if value.ndim else None
    return value.detach(), *torch.autograd.grad(value, [getattr(batch, name) for name in names], upstream)


# ---- The check before the measurement ----


def errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """The largest difference of each tensor, relative to the largest entry of the exact one; NaN counts as infinite."""
    out = []
    for x, y in zip(results, exact, strict=True):
        worst = ((x.double() - y).abs().max() / y.abs().max().clamp(min=1e-30)).item()
        out.append(worst if worst == worst else float("inf"))
    return out


class Check:
    """The exact results of one op on one batch, and plain torch's errors in its type, each computed once."""

    def __init__(self, op: str, batch: Batch, dtype: torch.dtype):
        self.op, self.batch, self.dtype = op, batch, dtype
        function, names = _functions()[OPS[op].function], OPS[op].grads
        self.exact = run(function, batch.cast(torch.float64, names), names)
        self.plain = errors(run(function, batch.cast(dtype, names), names), self.exact)

    def __call__(self, system: str, function: Callable[[Batch], Tensor]) -> list[float]:
        """The errors of a system, or [] for one that does only a part of the work. Raises AssertionError for large errors."""
        if not SYSTEMS[system].checked:
            return []
        names = inputs_of(system, self.op)
        batch = self.batch.cast(self.dtype, names)
        if SYSTEMS[system].destroys:
            batch.logits = batch.logits.detach().clone().requires_grad_()
        results = list(run(function, batch, names))
        if "padded" in names:
            at = 1 + names.index("padded")
            results[at] = results[at][batch.targets != -100]
        found = errors(results, self.exact)
        for error, plain in zip(found, self.plain, strict=True):
            limit = 2 * plain + FLOORS[self.dtype] if SYSTEMS[system].ours else 0.05
            assert error <= limit, f"{system} {self.op}: relative error {error:.2g}, at most {limit:.2g} is allowed"
        return found
