"""Losses and gradients of all back ends at the full reference shape, against float64 and against each other.

The tests compare small batches; only here does a GPU see several tiles, several groups of pairs and 64-bit offsets. A
sample of rows of the gradients is compared. The truth is written out below in float64, in blocks, and shares no function
with the package. An error may be at most twice the largest error of plain torch in the same type plus a constant, since
the loss is one number that plain torch may hit by luck.
"""

import torch
import torch.nn.functional as F

import dpo_fast
from bench.ops import BETA, OPS, Batch, make_batch
from bench.results import Results
from bench.systems import FLOORS, plain_linear_token_logps, plain_loss, plain_token_logps
from dpo_fast.backends import BACKENDS, resolve

BLOCK = 512  # rows in float64 at a time
SAMPLE = 64


class Truth:
    """Loss [], log-probs [2B], coefficients [N] of the rows, and gradients of a sample, in float64."""

    def __init__(self, rows, weight, targets, segments, count: int, seed: int = 0):
        """`rows` are logits [N, V], or hidden states [N, D] with `weight` [V, D]; `segments` [N] are the rows' sequences."""
        self.rows, self.wide = rows, None if weight is None else weight.double()
        scored = targets != -100
        safe = targets.masked_fill(~scored, 0)
        token = torch.cat([self._log_probs(a).gather(1, safe[a : a + BLOCK, None])[:, 0] for a in self._blocks()])
        logps = token.new_zeros(count).index_add(0, segments, token.where(scored, 0))
        rng = torch.Generator().manual_seed(seed)
        # The reference is near, so that no sigmoid is 0 or 1, which would hide an error of a coefficient.
        self.ref_logps = logps.float() + 5 * torch.randn(count, generator=rng).to(rows.device)
        logps.requires_grad_()
        self.loss = plain_loss(logps - self.ref_logps)
        (of_logps,) = torch.autograd.grad(self.loss, logps)
        self.loss, self.logps = self.loss.detach(), logps.detach()
        self.coef = of_logps[segments] * scored
        self.picked = torch.randperm(len(rows), generator=rng)[:SAMPLE].sort().values.to(rows.device)
        classes = rows.shape[1] if weight is None else weight.shape[0]
        words = torch.randperm(classes, generator=rng)[: SAMPLE // 2].to(rows.device)
        self.words = torch.cat([words, safe[self.picked][: SAMPLE // 2]]).unique()
        one_hot = F.one_hot(safe[self.picked], classes)
        self.of_logits = self.coef[self.picked, None] * (one_hot - self._log_probs(self.picked).exp())  # [SAMPLE, V]
        self.of_hidden = None if weight is None else self.of_logits @ self.wide
        self.of_weight = None if weight is None else self._of_weight(safe)

    def _blocks(self):
        return range(0, len(self.rows), BLOCK)

    def _log_probs(self, at):
        """Log-probs [n, V] of the block from row `at`, or of the rows `at`."""
        x = self.rows[at : at + BLOCK] if isinstance(at, int) else self.rows[at]
        return (x.double() if self.wide is None else x.double() @ self.wide.T).log_softmax(-1)

    def _of_weight(self, safe):
        """The rows `words` of the gradient of the weight, [words, D]."""
        total = 0
        for a in self._blocks():
            here = slice(a, a + BLOCK)
            residual = (safe[here, None] == self.words).double() - self._log_probs(a)[:, self.words].exp()
            total = total + (self.coef[here, None] * residual).T @ self.rows[here].double()
        return total

    def errors(self, found: dict) -> dict[str, float]:
        """The largest difference of each tensor, relative to the largest entry of the exact one; NaN counts as infinite."""
        exact = {
            "loss": self.loss, "logps": self.logps, "logits": self.of_logits, "hidden": self.of_hidden, "weight": self.of_weight,
        }  # fmt: skip
        out = {}
        for name, x in found.items():
            worst = ((x.double() - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1e-30)).item()
            out[name] = worst if worst == worst else float("inf")
        return out


def agreement(results: Results, dtype: torch.dtype, n: int, d: int, v: int, t: int) -> None:
    """Add rows for logits [n, v], then for hidden states [n, d] with a frozen and a trained head."""
    for op in (
        "dpo_loss + gradient",
        "linear_dpo_loss + gradient, frozen head",
        "linear_dpo_loss + gradient, trained head",
    ):
        head = {"op": f"agreement of {op}", "shape": f"{n} x {d} x {v}" if OPS[op].gemms else f"{n} x {v}"}
        if results.out_of_time:
            results.add(**head, skipped="out of time")
            continue
        with results.attempt(**head):
            pairs = n // t if OPS[op].gemms else n // (2 * t)
            batch = make_batch(OPS[op], pairs, t, d, v, dtype, results.device, seed=3)
            batch.padded = None
            _compare(results, op, batch, dtype, head)


def _compare(results: Results, op: str, batch: Batch, dtype, head: dict) -> None:
    count, device = len(batch.targets), batch.targets.device
    names = OPS[op].grads
    if OPS[op].gemms:
        truth = Truth(batch.hidden, batch.weight, batch.live_targets, batch.segments, count)
        variants = _hidden_variants(batch, truth.ref_logps, "weight" in names)
    else:
        segments = torch.arange(count, device=device).repeat_interleave(batch.targets.shape[1])
        truth = Truth(batch.logits.flatten(0, 1), None, batch.targets.flatten(), segments, count)
        variants = _logits_variants(batch, truth.ref_logps)
    plain = {}
    with results.attempt(**head, system="plain torch"):
        results.now(head["op"], "")
        plain = truth.errors(_sampled(_plain(op, truth.ref_logps), batch.cast(dtype, names), names, truth))
        results.add(**head, system="plain torch", errors=plain)
    first: dict[str, dict] = {}  # variant -> the results of the first back end
    for backend in BACKENDS:
        system = f"dpo_fast {backend}"
        try:
            resolve(backend, device)
        except ValueError as error:
            results.add(**head, system=system, skipped=str(error))
            continue
        for name, call in variants.items():
            if system in results.without or results.out_of_time:
                results.add(**head, system=system, variant=name, skipped="left out, or out of time")
                continue
            results.now(f"{head['op']}, {name}", system)
            with results.attempt(**head, system=system, variant=name):
                fresh = batch.cast(dtype, names)
                if "inplace" in name:
                    fresh.logits = fresh.logits.detach().clone().requires_grad_()
                found = _sampled(lambda b, call=call, backend=backend: call(b, backend), fresh, names, truth)
                errors = truth.errors(found)
                apart = {
                    key: ((x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1e-30)).item()
                    for key, x in found.items() if (y := first.get(name, found)[key]) is not x
                }  # fmt: skip
                first.setdefault(name, found)
                limit = 2 * max(plain.values(), default=1e-2) + FLOORS[dtype]
                ok = all(error <= limit for error in errors.values())
                results.add(**head, system=system, variant=name, ok=ok, errors=errors, from_first_back_end=apart)
                del fresh, found


def _sampled(function, batch: Batch, names: tuple[str, ...], truth: Truth) -> dict:
    """Loss, log-probs [2B] where `function` returns them, and the sampled gradients of the tensors `names`."""
    loss, logps = function(batch)
    gradients = torch.autograd.grad(loss, [getattr(batch, name) for name in names])
    found = {"loss": loss.detach()}
    if logps is not None:
        found["logps"] = logps.detach()
    for name, gradient in zip(names, gradients, strict=True):
        rows = gradient if name == "weight" else gradient.reshape(-1, gradient.shape[-1])
        found[name] = rows[truth.words if name == "weight" else truth.picked].clone()
    return found


def _plain(op: str, ref_logps):
    if not OPS[op].gemms:

        def plain(b):
            logps = plain_token_logps(b.logits, b.targets).sum(-1)
            return plain_loss(logps - ref_logps), logps
    else:

        def plain(b):
            token = plain_linear_token_logps(b.hidden, b.weight, b.live_targets)
            logps = token.new_zeros(len(b.targets)).index_add(0, b.segments, token)
            return plain_loss(logps - ref_logps), logps

    return plain


def _both(output) -> tuple:
    """The loss and the log-probs [2B] of an output."""
    return output.loss, torch.cat([output.chosen_logps, output.rejected_logps])


def _logits_variants(batch: Batch, ref_logps) -> dict:
    count, t = batch.targets.shape
    bounds = torch.arange(count + 1, dtype=torch.int32) * t

    def padded(b, backend, **more):
        return _both(dpo_fast.dpo_loss(b.logits, b.targets, ref_logps, beta=BETA, backend=backend, **more))

    def packed(b, backend, cu_seqlens):
        flat = b.logits.flatten(0, 1), b.targets.flatten()
        return _both(dpo_fast.dpo_loss(*flat, ref_logps, cu_seqlens=cu_seqlens, beta=BETA, backend=backend))

    ones = torch.ones(count // 2, device=batch.targets.device)
    return {
        "padded": padded,
        "inplace": lambda b, backend: padded(b, backend, inplace=True),
        "cu_seqlens on the CPU": lambda b, backend: packed(b, backend, bounds),
        "cu_seqlens on the device": lambda b, backend: packed(b, backend, bounds.to(batch.targets.device)),
        "two launches": lambda b, backend: padded(b, backend, pair_weights=ones),
    }


def _hidden_variants(batch: Batch, ref_logps, trained: bool) -> dict:
    row_bytes = batch.weight.shape[0] * batch.weight.element_size()
    longest = int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max())
    workspaces = {"": dpo_fast.ops.WORKSPACE_BYTES}
    if trained:  # a frozen head keeps nothing
        workspaces["several groups, "] = 2 * longest * row_bytes
        workspaces["rows past the workspace, "] = max(longest // 3, 1) * row_bytes

    def call(b, backend, size, device):
        cu_seqlens = b.cu_seqlens.to(device)
        return _both(
            dpo_fast.linear_dpo_loss(
                b.hidden,
                b.weight,
                b.live_targets,
                ref_logps,
                cu_seqlens=cu_seqlens,
                beta=BETA,
                backend=backend,
                workspace_bytes=size,
            )
        )

    return {
        f"{name}cu_seqlens on the {where}": lambda b, backend, size=size, device=device: call(b, backend, size, device)
        for name, size in workspaces.items()
        for where, device in (("CPU", "cpu"), ("device", batch.hidden.device))
    }
