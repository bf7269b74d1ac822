"""SIGTERM ends a run with a checkpoint, on all ranks at the same step; steps that are not finite are found and named."""

import contextlib
import logging
import signal
import threading
from collections import deque

import torch
from transformers import TrainerCallback

from .quantised import numbers

logger = logging.getLogger(__name__)
TERMINATED = 128 + signal.SIGTERM  # the exit status that shells and schedulers know
_SKIPS_IN_A_ROW = 10
_SHOWN = 8  # pairs that a message names at most


class Termination(TrainerCallback):
    """While `listening`, SIGTERM lets the current step end, writes a checkpoint and stops; a second one kills at once.

    Ranks must stop at the same step. Each contributes `vote` to a sum that is reduced at the start of a step anyway
    (`count`), and all of them read the sum of the step before, which the device has finished long ago.
    """

    def __init__(self):
        self.requested = False
        self.stopped = False  # whether the run ended before its last step
        self._counted: deque[torch.Tensor] = deque()

    @property
    def vote(self) -> float:
        """1 once this process has received a signal, else 0."""
        return float(self.requested)

    def count(self, votes: torch.Tensor) -> None:
        """Take the sum of all ranks' votes of the step that begins, a scalar on the device."""
        self._counted.append(votes)

    @contextlib.contextmanager
    def listening(self):
        """Handle SIGTERM inside. Only the main thread can have signal handlers; in others SIGTERM does what it did."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.requested = self.stopped = False
        self._counted.clear()
        before = signal.signal(signal.SIGTERM, lambda *_: self._request(before))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _request(self, before) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def on_step_end(self, args, state, control, **kwargs):
        stop = self.requested
        if args.world_size > 1:
            stop = len(self._counted) > 1 and bool(self._counted.popleft() > 0)
        last = state.global_step >= state.max_steps
        if stop and not last:
            self.stopped = True
            control.should_save = control.should_training_stop = True
        if (last or self.stopped) and args.logging_strategy == "steps":
            control.should_log = True  # or the metrics of the steps since the last log would be lost


class FiniteWatch:
    """The losses of each pair since the last log, kept on the device so that a bad step can be named without waiting."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self._seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def add(self, step: int, index: torch.Tensor, losses: torch.Tensor) -> None:
        """Keep the pairs of one forward pass: their places in the training data [B] and their losses [B]."""
        self._seen.append((step, index, losses.detach()))

    def clear(self) -> None:
        """Forget the losses seen so far, which were finite."""
        self._seen.clear()

    def bad_step(self) -> tuple[int, list[int], bool] | None:
        """The first step with a loss that is not finite: (step, its bad pairs, whether these are all of its pairs).

        Returns None where all losses are finite. It reads every rank's losses, so all ranks must call it.
        """
        rows = [(step, index.tolist(), losses.isfinite().tolist()) for step, index, losses in self._seen]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            rows = gather_object(rows)
        steps = [step for step, _, finite in rows if not all(finite)]
        if not steps:
            return None
        first = min(steps)
        seen = {i: ok for step, index, finite in rows if step == first for i, ok in zip(index, finite, strict=True)}
        bad = sorted(i for i, ok in seen.items() if not ok)
        return first, bad, len(bad) == len(seen)

    def describe(self, step: int, gradient: float | None) -> str:
        """A sentence that names what is not finite: the pairs of the first bad step, or else the gradient of `step`."""
        found = self.bad_step()
        if found is None:
            return f"step {step}: the gradient's norm is {gradient}, while the loss of every pair is finite"
        first, bad, everything = found
        if everything and len(bad) > 1:
            return f"step {first}: the loss of all {len(bad)} pairs is nan or inf, so the weights were before it"
        return f"step {first}: the loss of {name_pairs(bad)} of the training data is nan or inf"


def name_pairs(pairs: list[int]) -> str:
    """ "pairs 3, 17", counted from 0."""
    more = f", ... ({len(pairs)} in all)" if len(pairs) > _SHOWN else ""
    return f"pair{'s' if len(pairs) > 1 else ''} {', '.join(map(str, pairs[:_SHOWN]))}{more}"


class SkipNonFinite(TrainerCallback):
    """`on_nan="skip"`: leaves out the update of a step whose gradient is not finite. It waits for the device every step.

    Without gradients, torch's optimizers leave parameters and moments as they are; the schedule goes on.
    """

    def __init__(self, watch: FiniteWatch):
        self.watch, self.skipped, self._in_a_row = watch, False, 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = list(model.parameters())
        self.skipped = not gradients_are_finite(parameters, self.watch.accelerator)
        found = self.watch.bad_step() if self.skipped else None
        self.watch.clear()
        self._in_a_row = self._in_a_row + 1 if self.skipped else 0
        if not self.skipped:
            return
        what = "its gradient" if found is None else f"the loss of {name_pairs(found[1])} of the training data"
        if self._in_a_row > _SKIPS_IN_A_ROW:
            raise ValueError(
                f"{_SKIPS_IN_A_ROW} steps in a row were not finite, up to step {state.global_step}: lower the "
                "learning rate, or look at the pairs named above"
            )
        if state.is_world_process_zero:
            logger.warning("step %d is left out: %s is nan or inf", state.global_step + 1, what)
        for parameter in parameters:
            parameter.grad = None


def gradients_are_finite(parameters, accelerator) -> bool:
    """Whether all gradients are finite, on all ranks; waits for the device."""
    return _finite((p.grad for p in parameters if p.grad is not None), accelerator)


def weights_are_finite(model, accelerator) -> bool:
    """Whether all weights are finite, on all ranks; waits for the device."""
    return _finite(numbers(model), accelerator)


def _finite(tensors, accelerator) -> bool:
    local = [t.to_local() if hasattr(t, "to_local") else t for t in (x.detach() for x in tensors)]
    bad = [(~t.isfinite()).any() for t in local if t.is_floating_point()]
    count = torch.stack(bad).sum().to(accelerator.device) if bad else torch.zeros((), device=accelerator.device)
    if accelerator.num_processes > 1:
        count = accelerator.reduce(count.double())
    return not bool(count)
