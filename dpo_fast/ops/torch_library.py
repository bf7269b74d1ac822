"""What the torch.library ops share: how one is made, and how gradients that exist already are attached to a loss.

The losses compute their gradients in the forward pass. `with_gradients` is the one op that autograd sees there: in
backward it returns them, multiplied on the device by the gradient of the loss.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..backends import resolve


def library_op(name: str, mutates: Sequence[str] = ()) -> Callable:
    """`torch.library.custom_op` in the namespace dpo_fast, with autocast switched off inside."""

    def wrap(function: Callable):
        @functools.wraps(function)
        def plain(*args):
            with torch.autocast(args[0].device.type, enabled=False):
                return function(*args)

        op = torch.library.custom_op(f"dpo_fast::{name}", plain, mutates_args=mutates)
        op.function = function
        return op

    return wrap


_ONCE = (
    "the ops of dpo_fast have first derivatives only: write the loss in plain PyTorch (logits.log_softmax(-1), then "
    "dpo_fast.preference_loss) where a gradient is differentiated again"
)


def once_differentiable(backward: Callable) -> Callable:
    """Wrap the `backward` of an op so that differentiating its gradients again is an error.

    torch.autograd.function.once_differentiable raises none where the incoming gradient is a constant.
    """

    def refused(x):
        if isinstance(x, list):
            return [refused(part) for part in x]
        if not isinstance(x, Tensor):
            return x
        return torch._C._functions.DelayedError(_ONCE.encode(), 1)(x.detach().requires_grad_())

    @functools.wraps(backward)
    def first(ctx, *grads):
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        return tuple(refused(x) for x in found)

    return first


def pack_numbers(*values: float | None) -> Tensor:
    """Options as one float64 tensor on the CPU, None as NaN: torch.compile takes a tensor as an input of the graph.

    A number in the schema of an op would be a constant of it, compiled again for each value. To read the tensor inside of
    an op is no wait for a device.
    """
    numbers = [float("nan") if x is None else float(x) for x in values]
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float64, device="cpu")
        # A product is what torch.compile can trace with a number that varies.
        return torch.stack([one * x for x in numbers])
    return torch.from_numpy(np.array(numbers, dtype=np.float64))


def unpack_numbers(packed: Tensor) -> list[float | None]:
    """What `pack_numbers` packed."""
    return [None if x != x else x for x in packed.tolist()]


def split_names(outputs: str) -> tuple[str, ...]:
    """The names in a comma-separated string, since the schema of an op can hold no tuple of strings."""
    return tuple(outputs.split(",")) if outputs else ()


def stacked(stats: dict[str, Tensor], like: Tensor) -> Tensor:
    """Statistics as one tensor [K, N] of the type of `like`, as an op returns them."""
    return torch.stack([x.to(like.dtype) for x in stats.values()]) if stats else like.new_empty(0, len(like))


def unstacked(stats: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """The statistics that `stacked` packed, by name."""
    return {name: stats[k].bool() if name == "is_top1" else stats[k] for k, name in enumerate(outputs)}


# ---- Gradients that exist already ----


_LOSS_ALONE = (
    "only `loss` of dpo_loss and linear_dpo_loss carries a gradient, computed in their forward pass: losses, chosen_logps "
    "and rejected_logps cannot go into a loss of your own. Use loss_weights, pair_weights or sft_weight, detach them, or "
    "take sequence_logps or linear_sequence_logps with preference_loss, whose outputs all carry it"
)


@library_op("scale_", mutates=("x",))
def scale_(x: Tensor, factor: Tensor, unused: Sequence[Tensor], backend: str) -> None:
    """`x *= factor`, which costs nothing where the factor is 1. The gradients `unused` must be zero.

    A compiled backward pass passes zeros for outputs that nothing reads, so this op has to look at their values.
    """
    for grad in unused:
        if grad.is_cuda:
            torch._assert_async((grad == 0).all(), _LOSS_ALONE)
        elif grad.any():
            raise RuntimeError(_LOSS_ALONE)
    resolve(backend, x.device, x.dtype).scale_(x, factor)


@scale_.register_fake
def _(x, factor, unused, backend):
    return None


@torch.library.custom_op("dpo_fast::with_gradients", mutates_args=())
def with_gradients(
    loss: Tensor,
    losses: Tensor,
    logps: Tensor,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, losses and log-probs. `gradients` are the gradients of `loss` with respect to `inputs`; backward multiplies
    them in place. Backward through the other two outputs is an error, since their gradients were not computed.
    """
    return loss.clone(), losses.clone(), logps.clone()


@with_gradients.register_fake
def _(loss, losses, logps, inputs, gradients, backend):
    return torch.empty_like(loss), torch.empty_like(losses), torch.empty_like(logps)


def _save_gradients(ctx, inputs, output):
    ctx.backend = inputs[5]
    ctx.save_for_backward(*inputs[4])
    ctx.set_materialize_grads(False)


@once_differentiable
def _hand_out(ctx, grad, *others):
    used = [x for x in others if x is not None]
    # Where a graph is made, these are zeros of a subclass of Tensor, and `scale_` looks at them when the graph runs.
    if any(type(x) is Tensor for x in used):
        raise RuntimeError(_LOSS_ALONE)
    gradients = list(ctx.saved_tensors)
    for x in gradients:
        scale_(x, grad, used, ctx.backend)
    return None, None, None, gradients, [None] * len(gradients), None


with_gradients.register_autograd(_hand_out, setup_context=_save_gradients)
