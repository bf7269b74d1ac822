"""Parts of a batch: one piece of memory each, moved in one copy, and the worker that makes them."""

import multiprocessing
import os
import pickle
import signal

import pytest
import torch
from forest_tools import CASES, check
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast.forest.batch import ForestCollator, Part


def part_of(name: str) -> Part:
    forest = check(CASES[name], "prefix", True)
    return Part(
        forest, torch.arange(2), torch.tensor([[1.5, 2.5], [3.5, 4.5]]), 2, 7, 9, torch.tensor([0.5, 0.9]).double()
    )


def tensors_of(part: Part) -> dict[str, torch.Tensor]:
    return {**part.forest.tensors(), "ref_logps": part.ref_logps, "p_chosen": part.p_chosen}


def test_a_part_is_one_piece_of_memory():
    part = part_of("several groups")
    packed = part.pack()
    assert len({x.untyped_storage().data_ptr() for x in tensors_of(packed).values()}) == 1
    for name, x in tensors_of(packed).items():
        assert torch.equal(x, tensors_of(part)[name]), name
        assert x.dtype == tensors_of(part)[name].dtype
        assert x.data_ptr() % 16 == 0
    # From another process, as a worker sends it, it is one piece still.
    again = pickle.loads(pickle.dumps(packed))._views_of(packed.packed.clone())
    assert all(torch.equal(x, tensors_of(part)[name]) for name, x in tensors_of(again).items())
    assert (again.pairs, again.chosen_tokens, again.longest, again.forest.spans) == (2, 7, 9, part.forest.spans)


def test_a_part_moves_in_one_copy():
    class Copies(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "device" in (kwargs or {}) and torch.device(kwargs["device"]).type == "meta":
                self.found.append((str(func), kwargs["non_blocking"]))
            return func(*args, **(kwargs or {}))

    part = part_of("several groups")
    part.forest.cache["blocks"] = "of another device"
    with Copies() as copies:
        moved = part.on("meta")
    assert copies.found == [("aten._to_copy.default", True)]
    assert all(x.is_meta for x in tensors_of(moved).values())
    assert {name: (x.shape, x.dtype) for name, x in tensors_of(moved).items()} == {
        name: (x.shape, x.dtype) for name, x in tensors_of(part).items()
    }
    assert moved.forest.cache == {}
    assert moved.index is part.index
    assert part.on("cpu") is part


def test_accelerate_leaves_parts_alone():
    operations = pytest.importorskip("accelerate.utils.operations")
    batch = {"parts": [part_of("several groups")]}
    assert operations.send_to_device(batch, torch.device("meta"))["parts"][0] is batch["parts"][0]


def test_a_worker_that_collates_outlives_sigterm():
    """A signal to the whole process group stops a run in order; what stops must still get its batches."""
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}] * 64
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=1, collate_fn=ForestCollator())
    batches = iter(loader)
    next(batches)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
    assert sum(1 for _ in batches) == 31


@pytest.mark.gpu
def test_pin_memory():
    part = part_of("several groups").pin_memory()
    assert all(x.is_pinned() for x in tensors_of(part).values() if x.numel())
    moved = part.on("cuda")
    assert all(torch.equal(x.cpu(), tensors_of(part)[name]) for name, x in tensors_of(moved).items())
