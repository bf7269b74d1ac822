"""What the torch.library ops share: how one is made, and how gradients that exist already hang on a loss.

The losses compute their gradients in the forward pass. `with_gradients` is the one op that autograd sees there: it hands
them out in backward, multiplied on the device by the gradient of the loss.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends import resolve


def library_op(name: str, mutates: Sequence[str] = ()) -> Callable:
    """`torch.library.custom_op` in the namespace dpo_fast; autocast stays outside."""

    def wrap(function: Callable):
        @functools.wraps(function)
        def plain(*args):
            with torch.autocast(args[0].device.type, enabled=False):
                return function(*args)

        op = torch.library.custom_op(f"dpo_fast::{name}", plain, mutates_args=mutates)
        op.function = function
        return op

    return wrap


def split_names(outputs: str) -> tuple[str, ...]:
    """The schema of an op holds no tuple of strings."""
    return tuple(outputs.split(",")) if outputs else ()


def stacked(stats: dict[str, Tensor], like: Tensor) -> Tensor:
    """Statistics as one tensor [K, N] of the type of `like`, as an op returns them."""
    return torch.stack([x.to(like.dtype) for x in stats.values()]) if stats else like.new_empty(0, len(like))


def unstacked(stats: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """What `stacked` packed."""
    return {name: stats[k].bool() if name == "is_top1" else stats[k] for k, name in enumerate(outputs)}


# ---- Gradients that exist already ----


@library_op("scale_", mutates=("x",))
def scale_(x: Tensor, factor: Tensor, backend: str) -> None:
    """`x *= factor`, free where the factor is 1."""
    resolve(backend, x.device, x.dtype).scale_(x, factor)


@scale_.register_fake
def _(x, factor, backend):
    return None


@torch.library.custom_op("dpo_fast::with_gradients", mutates_args=())
def with_gradients(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor], backend: str) -> Tensor:
    """The loss; its gradients with respect to `inputs` are `gradients`, which backward multiplies in place."""
    return loss.clone()


@with_gradients.register_fake
def _(loss, inputs, gradients, backend):
    return torch.empty_like(loss)


def _save_gradients(ctx, inputs, output):
    ctx.backend = inputs[3]
    ctx.save_for_backward(*inputs[2])


def _hand_out(ctx, grad):
    gradients = list(ctx.saved_tensors)
    for x in gradients:
        scale_(x, grad, ctx.backend)
    return None, gradients, [None] * len(gradients), None


with_gradients.register_autograd(_hand_out, setup_context=_save_gradients)
