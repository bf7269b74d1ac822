"""Nothing waits for the device between two logs: calls that read a tensor's value on the host are counted.

There is no GPU here, so the ops are told that their tensors are on one: the back end `torch` then takes every branch it
takes there, and runs on the CPU all the same.
"""

import traceback

import pytest
import torch
from op_tools import pairs

from dpo_fast import dpo_loss, linear_dpo_loss, linear_token_logps, sequence_logps, token_logps
from dpo_fast.ops.torch_library import pack_numbers, unpack_numbers

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
V, D = 37, 5


@pytest.fixture
def on_gpu(monkeypatch):
    """Every tensor says that it is on a GPU; lists where the host has read one since, as `file:line name`."""
    found = []

    def counted(name, read):
        def method(self, *args, **kwargs):
            # The caller, not what it calls: `int(x)` may become `x.item()`.
            caller = traceback.extract_stack(limit=2)[0]
            if caller.name == "unpack_numbers":  # Of a tensor that is on the CPU whatever the device: see below.
                return read(self, *args, **kwargs)
            found.append(f"{caller.filename}:{caller.lineno} {name}")
            return read(self, *args, **kwargs)

        return method

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return found


def test_reads_are_counted(on_gpu):
    x = torch.arange(3)
    assert x.is_cuda
    if x[1] and int(x[2]) and x.tolist() and x.nonzero().numel():
        pass
    assert {line.split()[-1] for line in on_gpu} >= {"__bool__", "__int__", "tolist", "nonzero"}


def test_options_are_on_the_cpu_whatever_the_default_device():
    """What torch.device("cuda") changes is the device of what is made without one."""
    compiled = torch.compile(pack_numbers, backend="eager", fullgraph=True)
    with torch.device("meta"):
        assert torch.ones(()).device.type == "meta"
        for pack in (pack_numbers, compiled):
            assert unpack_numbers(pack(1.0, None, 0.1)) == [1.0, None, 0.1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "aot", ["sigmoid", "sft"]])
def test_dpo_loss(on_gpu, loss_type, inplace, packed):
    x, targets, cu = pairs([(2, 3), (0, 4), (1, 1), (3, 2)], V, packed=packed, dtype=torch.float32)
    x = x.requires_grad_() * 1.0
    dpo_loss(x, targets, cu_seqlens=cu, loss_type=loss_type, inplace=inplace, backend="torch").loss.backward()
    assert not on_gpu


@pytest.mark.parametrize("outputs", [(), ("entropy", "is_top1")])
def test_log_probs(on_gpu, outputs):
    x, targets, cu = pairs([(2, 3), (0, 4)], V, packed=True, dtype=torch.float32)
    found = token_logps(x.requires_grad_(), targets, outputs=outputs, backend="torch")
    (found[0] if outputs else found).sum().backward()
    sequence_logps(x, targets, cu_seqlens=cu, average=True, backend="torch").sum().backward()
    assert not on_gpu


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("workspace_bytes", [0, 1 << 20])
def test_output_layer(on_gpu, workspace_bytes, trained):
    hidden, targets, cu = pairs([(0, 3), (0, 4), (0, 1), (0, 2)], V, packed=True, dtype=torch.float32, width=D)
    leaves = {"hidden": hidden.requires_grad_(), "weight": torch.randn(V, D, requires_grad=trained)}
    options = {"bias": torch.randn(V, requires_grad=trained), "workspace_bytes": workspace_bytes, "backend": "torch"}
    linear_token_logps(**leaves, targets=targets, **options).sum().backward()
    linear_dpo_loss(**leaves, targets=targets, cu_seqlens=cu, **options).loss.backward()
    assert not on_gpu
