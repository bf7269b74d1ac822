"""Nothing waits for the device between two logs: calls that read a tensor's value on the host are counted.

There is no GPU here, so everything is told that its tensors are on one: the back end `torch` then takes every branch it
takes there, and runs on the CPU all the same.
"""

import contextlib
import traceback

import pytest
import test_cuda_attention
import tiny
import torch
from op_tools import pairs
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast import dpo_loss, linear_dpo_loss, linear_token_logps, sequence_logps, token_logps
from dpo_fast.ops.torch_library import pack_numbers, unpack_numbers

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
# What they and others become: ops whose result, or the size of it, must be known on the host.
OPS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_unique2", "unique_dim")
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


# ---- A step of training ----


class Reads(TorchDispatchMode):
    """Lists what hands values to the host, as the code of this project or of a library does it: `file:line name`."""

    def __init__(self):
        super().__init__()
        self.found, self.counts = [], True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        sized = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in OPS or masked or sized:
            self.add(name)
        return func(*args, **(kwargs or {}))

    def add(self, name: str) -> None:
        if self.counts:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            if frames[-1].name == "unpack_numbers":  # of a tensor that is on the CPU whatever the device
                return
            self.found.append(f"{frames[-1].filename}:{frames[-1].lineno} {name}")

    def counted(self, name: str, method):
        def call(x, *args, **kwargs):
            self.add(name)
            return method(x, *args, **kwargs)

        return call

    @contextlib.contextmanager
    def paused(self):
        before, self.counts = self.counts, False
        try:
            yield
        finally:
            self.counts = before


@pytest.mark.parametrize("bf16", [False, True])
def test_steps_of_training(tmp_path, monkeypatch, bf16):
    """bf16 takes flash attention's way, with its kernels written out."""
    transformers = pytest.importorskip("transformers")
    from dpo_fast import DPOConfig, DPOTrainer
    from dpo_fast.forest import varlen
    from dpo_fast.forest.batch import ForestCollator

    reads, steps = Reads(), {}

    def uncounted(function):
        def call(*args):
            with reads.paused():
                return function(*args)

        return call

    # Batches are made of what is on the CPU, in another process where there is a GPU.
    monkeypatch.setattr(ForestCollator, "__call__", uncounted(ForestCollator.__call__))
    monkeypatch.setattr(varlen, "flash_forward", uncounted(test_cuda_attention.forward))
    monkeypatch.setattr(varlen, "flash_backward", uncounted(test_cuda_attention.backward))

    class PerStep(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            reads.found = steps.setdefault(state.global_step + 1, [])

    args = DPOConfig(
        output_dir=str(tmp_path / "out"), ref_cache_dir=str(tmp_path / "cache"), use_cpu=True, bf16=bf16, report_to="none",
        max_steps=7, logging_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_tokens_per_batch=40,
        save_strategy="no", disable_tqdm=True, backend="torch", optim="sgd", seed=1, dataloader_pin_memory=False,
    )  # fmt: skip
    model = tiny.llama(dtype=torch.float32)
    model.lm_head.requires_grad_(not bf16)  # a CPU has no product of bf16 in float32
    trainer = DPOTrainer(model, args=args, train_dataset=tiny.pairs(40), callbacks=[PerStep()])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for name in ("tolist", "numpy", "cpu"):  # no op of a tensor on a CPU
        monkeypatch.setattr(torch.Tensor, name, reads.counted(name, getattr(torch.Tensor, name)))
    with reads:
        trainer.train()
    print(steps)
    assert sorted(steps) == list(range(1, 8))
    (start,) = steps[1]  # whether policy and reference agree
    assert "training/start_checks.py" in start
    assert not steps[2] + steps[4] + steps[5]
    for step in (3, 6):  # the metrics, and whether there are any; transformers' own loss and norm of the gradient
        ours = [
            line.rpartition("dpo_fast/training/")[2].split(":")[0]
            for line in steps[step]
            if "dpo_fast/training/" in line
        ]
        assert ours == ["reporting.py", "metrics.py"]
        assert len(steps[step]) == 4
