"""Ranks of a head that is cut along the vocabulary, against the whole head in float64: `torchrun run_vocab_parallel.py [MODEL]`."""

import datetime
import itertools
import sys

import pytest
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from dpo_fast import linear_dpo_loss, linear_sequence_logps, linear_token_logps
from dpo_fast.forest.model import prepare_model
from dpo_fast.forest.packing import PrefixForest
from dpo_fast.train import leave

OUTPUTS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
TRANSFORMS = ({}, {"logit_scale": -0.7, "softcap": 3.0, "temperature": 0.8})


def tensors(words: int, dtype: torch.dtype, seed: int = 0):
    make = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=make, dtype=torch.float64) for shape in ((300, 12), (words, 12), (words,))
    )
    targets = torch.randint(words, (300,), generator=make)
    targets[::7] = -100
    coef = torch.randn(300, generator=make, dtype=torch.float64)
    return [x.to(dtype) for x in (hidden, weight, bias)], targets, coef


def close(found, expected, name: str) -> None:
    tolerance = 1e-10 if found.dtype == torch.float64 else 2e-5
    scale = expected.double().abs().max().clamp(min=1)
    error = (found.double() - expected.double()).abs().max() / scale
    assert error <= tolerance, f"{name}: {error.item():.3g}"


def truth(hidden, weight, bias, targets, transform):
    """Log-probs and statistics in plain PyTorch."""
    z = torch.nn.functional.linear(hidden, weight, bias) * transform.get("logit_scale", 1.0)
    if "softcap" in transform:
        z = torch.tanh(z / transform["softcap"]) * transform["softcap"]
    raw, scored = z, targets != -100
    log_probs = (z / transform.get("temperature", 1.0)).log_softmax(-1)
    logps = log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0].where(scored, 0)
    stats = {
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "mean_logits": raw.mean(-1),
        "is_top1": log_probs.argmax(-1) == targets,
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
    }
    return logps, {name: x.where(scored, torch.zeros_like(x)) for name, x in stats.items()}


def leaves(inputs, frozen: bool = False):
    return [x.clone().requires_grad_(not frozen or k == 0) for k, x in enumerate(inputs)]


def part(x: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return x.chunk(ranks)[rank].contiguous()


def token_logps(rank: int, ranks: int) -> None:
    group = dist.group.WORLD
    cases = itertools.product(
        (torch.float64, torch.float32), (64, 8 * ranks - 3), TRANSFORMS, (False, True), (1 << 30, 0)
    )
    for dtype, words, transform, frozen, workspace in cases:
        inputs, targets, coef = tensors(words, dtype)
        hidden, weight, bias = leaves([x.double() for x in inputs], frozen)
        expected, stats = truth(hidden, weight, bias, targets, transform)
        (expected * coef).sum().backward()
        own = leaves([inputs[0], part(inputs[1], rank, ranks), part(inputs[2], rank, ranks)], frozen)
        settings = dict(transform, process_group=group, vocab_size=words, workspace_bytes=workspace)
        logps, found = linear_token_logps(*own[:2], targets, bias=own[2], outputs=OUTPUTS, **settings)
        (logps * coef.to(logps.dtype)).sum().backward()
        name = f"{dtype}, {words} words, {transform}, frozen {frozen}, workspace {workspace}: "
        close(logps, expected.detach(), name + "log-probs")
        for key in OUTPUTS:
            close(found[key].to(logps.dtype), stats[key].detach(), name + key)
        close(own[0].grad, hidden.grad, name + "hidden")
        if not frozen:
            close(own[1].grad, part(weight.grad, rank, ranks), name + "weight")
            close(own[2].grad, part(bias.grad, rank, ranks), name + "bias")
        with torch.no_grad():
            again = linear_token_logps(*own[:2], targets, bias=own[2], **settings)
        assert torch.equal(again, logps.detach()), name + "without a gradient"


def same_on_every_rank(x: torch.Tensor, ranks: int) -> None:
    others = [torch.empty_like(x) for _ in range(ranks)]
    dist.all_gather(others, x.detach().contiguous())
    assert all(torch.equal(x.detach(), other) for other in others)


def losses(rank: int, ranks: int) -> None:
    inputs, targets, _ = tensors(64, torch.float64)
    bounds = torch.tensor([0, 40, 90, 150, 200, 260, 300], dtype=torch.int32)
    reference = tensors(64, torch.float64, seed=1)[0]
    shared = {"cu_seqlens": bounds, "temperature": 1.3}
    for loss_type in ("sigmoid", "ipo", ["aot", "sft"]):
        whole, own = leaves(inputs), leaves([inputs[0], *(part(x, rank, ranks) for x in inputs[1:])])
        with torch.no_grad():
            ref_logps = linear_sequence_logps(*reference[:2], targets, bias=reference[2], **shared)
        expected = linear_dpo_loss(*whole[:2], targets, ref_logps, bias=whole[2], loss_type=loss_type, **shared)
        expected.loss.backward()
        cut = {"ref_hidden": reference[0], "ref_weight": part(reference[1], rank, ranks)}
        cut |= {"ref_bias": part(reference[2], rank, ranks), "process_group": dist.group.WORLD}
        found = linear_dpo_loss(*own[:2], targets, bias=own[2], loss_type=loss_type, **cut, **shared)
        found.loss.backward()
        close(found.losses.detach(), expected.losses.detach(), f"{loss_type}: losses")
        same_on_every_rank(found.losses, ranks)
        same_on_every_rank(own[0].grad, ranks)
        for k, name in enumerate(("hidden", "weight", "bias")):
            grad = whole[k].grad if k == 0 else part(whole[k].grad, rank, ranks)
            close(own[k].grad, grad, f"{loss_type}: {name}")


def distributed_tensors(ranks: int) -> None:
    """A DTensor head sharded on its rows, as transformers' tensor parallelism holds it."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    inputs, targets, coef = tensors(8 * ranks - 3, torch.float64)
    hidden, weight, bias = leaves(inputs)
    expected = truth(hidden, weight, bias, targets, {})[0]
    (expected * coef).sum().backward()
    for wrap in (False, True):
        own = leaves(inputs)[0]
        rows = distribute_tensor(own.detach(), mesh, [Replicate()]).requires_grad_() if wrap else own
        head, shift = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in inputs[1:])
        logps = linear_token_logps(rows, head, targets, bias=shift)
        (logps * coef).sum().backward()
        close(logps.detach(), expected.detach(), "DTensor: log-probs")
        grad = rows.grad.full_tensor() if wrap else rows.grad
        close(grad, hidden.grad, "DTensor: hidden")
        close(head.grad.full_tensor(), weight.grad, "DTensor: weight")
        close(shift.grad.full_tensor(), bias.grad, "DTensor: bias")


def refusals(rank: int, ranks: int) -> None:
    inputs, targets, _ = tensors(64, torch.float64)
    own = [inputs[0], part(inputs[1], rank, ranks)]
    for changes, words in (
        ({"vocab_size": 63 * ranks}, "cut the weight as torch.chunk does"),
        ({"process_group": None, "vocab_size": 64}, "has no effect without process_group"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_token_logps(*own, targets, **{"process_group": dist.group.WORLD, **changes})
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 64\)"):
        linear_token_logps(*own, targets.clamp(min=64), process_group=dist.group.WORLD)


def tensor_parallel_model(folder: str) -> None:
    """A model that transformers cut over the ranks (`tp_plan="auto"`): log-probs and gradients of a forest of pairs."""
    rows = tiny.pairs(6)
    forest = PrefixForest.build(
        [row["prompt_ids"] for row in rows] * 2, [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    )
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **kw) for kw in ({}, {"tp_plan": "auto"})
    ]
    assert isinstance(models[1].lm_head.weight, DTensor)
    found = []
    for model in models:
        prepare_model(model)
        logps = model(forest=forest)["token_logps"]
        (logps * torch.linspace(-1, 1, len(logps), dtype=torch.float64)).sum().backward()
        found.append(logps.detach())
    close(found[1], found[0], "tensor parallel: log-probs")
    for (name, one), (_, cut) in zip(*(model.named_parameters() for model in models), strict=True):
        close(
            cut.grad.full_tensor() if isinstance(cut.grad, DTensor) else cut.grad, one.grad, f"tensor parallel: {name}"
        )


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    token_logps(rank, ranks)
    losses(rank, ranks)
    distributed_tensors(ranks)
    refusals(rank, ranks)
    if len(sys.argv) > 1:
        tensor_parallel_model(sys.argv[1])
    dist.barrier()
    leave(0)
