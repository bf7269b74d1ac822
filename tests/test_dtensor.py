"""A head that is a DTensor, as FSDP2 and tensor parallelism leave it, on two gloo processes: computed or refused by name."""

import os

import forked
import pytest
import torch
import torch.multiprocessing as mp

from dpo_fast import dpo_loss, linear_dpo_loss, linear_sequence_logps, linear_token_logps, sequence_logps, token_logps
from dpo_fast.integrations.cross_entropy import linear_cross_entropy
from dpo_fast.integrations.liger import LigerFusedLinearDPOLoss
from dpo_fast.integrations.torch import DPOLoss, LinearDPOLoss
from dpo_fast.integrations.torchtune import get_batch_log_probs


def of_head(h, w, t, b):
    """Every front that takes a head, [several numbers]."""
    return [
        linear_token_logps(h, w, t, bias=b).sum(),
        linear_sequence_logps(h, w, t, bias=b).sum(),
        linear_dpo_loss(h, w, t, bias=b).loss,
        linear_dpo_loss(h, w.detach(), t, ref_hidden=h.detach() / 2, ref_weight=w, ref_bias=b).loss,
        LinearDPOLoss()(h, w, t, bias=b).loss,
        linear_cross_entropy(h, w, t, bias=b),
        LigerFusedLinearDPOLoss(use_ref_model=False)(w, h, t, b)[0],
    ]


def of_logits(x, t):
    return [
        lambda: token_logps(x, t),
        lambda: sequence_logps(x, t),
        lambda: dpo_loss(x, t),
        lambda: DPOLoss()(x, t),
        lambda: get_batch_log_probs(x, t),
    ]


def work(rank, store):
    from torch.distributed import init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    h, w, b = torch.randn(4, 5, 6).requires_grad_(), torch.randn(11, 6), torch.randn(11)
    t = torch.randint(11, (4, 5))
    t[:, 0] = -100
    sharded, bias = (distribute_tensor(x, mesh, [Shard(0)]) for x in (w, b))

    # Frozen: the whole is read, and nothing else changes.
    for ours, plain in zip(of_head(h, sharded, t, bias), of_head(h, w, t, b), strict=True):
        torch.testing.assert_close(ours, plain)
    # Trained: refused by name.
    trained = sharded.detach().requires_grad_()
    for front in (
        lambda: linear_token_logps(h, trained, t),
        lambda: linear_sequence_logps(h, trained, t),
        lambda: linear_dpo_loss(h, trained, t),
        lambda: LinearDPOLoss()(h, trained, t),
        lambda: linear_cross_entropy(h, trained, t),
        lambda: LigerFusedLinearDPOLoss(use_ref_model=False)(trained, h, t),
    ):
        with pytest.raises(ValueError, match=r"^weight is a DTensor"):
            front()
    # What the message says, where all ranks hold the same rows, and where each has its own.
    (want,) = torch.autograd.grad(linear_dpo_loss(h, w.requires_grad_(), t).loss, w)
    linear_dpo_loss(h, trained.full_tensor(), t).loss.backward()
    torch.testing.assert_close(trained.grad.full_tensor(), want)
    trained.grad = None
    linear_dpo_loss(h, trained.full_tensor(grad_placements=[Partial()]), t).loss.backward()
    torch.testing.assert_close(trained.grad.full_tensor(), 2 * want)

    logits = distribute_tensor(torch.randn(4, 5, 12), mesh, [Shard(2)])
    for front in of_logits(logits, t):
        with pytest.raises(ValueError, match=r"^logits is a DTensor"):
            front()
    hidden = distribute_tensor(h.detach(), mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"^hidden is a DTensor"):
        linear_token_logps(hidden, w, t)
    with pytest.raises(ValueError, match=r"^ref_hidden is a DTensor"):
        linear_dpo_loss(h, w, t, ref_hidden=hidden, ref_weight=w)
    torch.distributed.barrier()
    os._exit(0)  # To take the process group apart was seen to hang.


def test_a_head_that_is_a_dtensor(tmp_path):
    forked.context()
    mp.start_processes(work, (str(tmp_path / "store"),), nprocs=2, start_method="forkserver")
