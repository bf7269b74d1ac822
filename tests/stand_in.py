"""A stand-in for a GPU: the device "meta", whose tensors have shapes and types but no values.

torch derives shapes and types by the rules of each op, so arguments and types that an op does not take are found. The mode
here adds what only a GPU refuses, tensors of two devices that meet, and it refuses what would make the host wait.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_fast.ops import head, logits, torch_library

# Ops that may take tensors of two devices.
COPIES = ("_to_copy", "copy_", "_foreach_copy_")
# Ops whose result, or its size, the host has to know.
READS = ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero")


def bodies() -> dict:
    """What the ops of this package compute, by name; "meta" alone would take their fakes."""
    ops = [x for module in (head, logits, torch_library) for x in vars(module).values()]
    return {
        op._qualname: op.function for op in ops if isinstance(op, torch.library.CustomOpDef) and hasattr(op, "function")
    }


class OnDevice(TorchDispatchMode):
    """Runs what is inside as on a GPU; `ops` counts the calls there by name.

    The ops of this package run, and must return what their fakes say.
    """

    def __init__(self):
        super().__init__()
        self.ops: dict[str, int] = {}
        self.bodies = bodies()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(x.is_meta for x in tensors):
            return func(*args, **kwargs)
        self.ops[name] = self.ops.get(name, 0) + 1
        if func.namespace == "aten":
            if name in READS:
                raise RuntimeError(f"{func} waits for the device")
            if name not in COPIES and any(not x.is_meta and x.ndim for x in tensors):
                raise RuntimeError(f"{func} got tensors of two devices: {[(x.device, x.shape) for x in tensors]}")
        if func is torch.ops.aten.addmm.dtype_out:
            return _addmm_dtype_out(*args, **kwargs)
        found = func(*args, **kwargs)
        if body := self.bodies.get(func._schema.name):
            with torch.no_grad(), self:
                computed = body(*args, **kwargs)
            said, done = (
                [(x.shape, x.dtype, x.stride()) for x in tree_leaves(y) if x is not None] for y in (found, computed)
            )
            if said != done:
                raise RuntimeError(f"{func} returns {done}, and its fake {said}")
        return found


def _addmm_dtype_out(total, a, b, out_dtype, *, out):
    """The rules of CUDA's; on "meta" torch confuses it with the op without a type."""
    assert (b.dtype, out.dtype) == (a.dtype, out_dtype)
    assert total.dtype in (out_dtype, a.dtype)
    assert total.shape == out.shape == torch.mm(a, b).shape
    return out


@contextlib.contextmanager
def on_device(monkeypatch):
    """Inside, "meta" is a GPU: its tensors say that they are on one, and autocast knows it."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.is_meta))

    def known(function):
        def here(x):
            return "cpu" if isinstance(x, str) and x == "meta" else x

        return lambda *args, **kwargs: function(*map(here, args), **{key: here(x) for key, x in kwargs.items()})

    for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
        monkeypatch.setattr(torch, name, known(getattr(torch, name)))
    with OnDevice() as mode:
        yield mode


def cpu_as_gpu(patch) -> None:
    """Have tensors of the CPU say that they are on a GPU: what is taken there computes here, with values."""
    patch.setattr(torch.Tensor, "is_cuda", True)
    mm, addmm = torch.mm, torch.addmm

    # A CPU has no products of half precision in float32.
    def wide_mm(a, b, *, out_dtype=None, **out):
        return mm(a, b, **out) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype))

    def wide_addmm(total, a, b, *, out_dtype=None, out=None):
        return addmm(total, *((a, b) if out_dtype is None else (a.to(out_dtype), b.to(out_dtype))), out=out)

    patch.setattr(torch, "mm", wide_mm)
    patch.setattr(torch, "addmm", wide_addmm)
