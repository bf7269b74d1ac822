"""The launchers of every back end, called as they are: what no public op lets through."""

import pytest
import torch
from op_tools import poison  # noqa: F401 - poison is a fixture

from dpo_fast.backends import resolve

pytestmark = pytest.mark.usefixtures("poison")
V = 37


@pytest.mark.parametrize("bad", [V, -1, -99, 2**40])
def test_launchers_and_targets_outside_the_vocabulary(bad, backend):
    """A GPU does not look at targets: such a row, and the pair that holds it, are NaN, and no other is touched."""
    launch = resolve(backend, "cpu")
    logits = torch.randn(7, V)
    targets = torch.tensor([3, -100, bad, 5, 0, 1, 2])
    cu = torch.tensor([0, 1, 3, 5, 7], dtype=torch.int32)
    fine = targets.clone()
    fine[2] = -100
    transform = {"scale": 1.5, "softcap": 4.0, "temperature": 0.7, "outputs": ("entropy", "is_top1")}
    plain = {**transform, "outputs": ()}
    forward = [launch.logps_fwd(logits, t, **transform) for t in (targets, fine)]
    residuals = [logits.clone(), logits.clone()]
    residual = [launch.residual_(x, t, **transform) for x, t in zip(residuals, (targets, fine), strict=True)]
    plain.pop("outputs")
    grads = [
        launch.logps_bwd(logits, t, lse, torch.ones(7), **plain, out=torch.empty_like(logits))
        for t, (_, lse, _) in zip((targets, fine), forward, strict=True)
    ]
    others = torch.tensor([0, 1, 3, 4, 5, 6])
    for mine, other in ((forward[0][0], forward[1][0]), (residual[0][0], residual[1][0]), residuals, grads):
        assert mine[2].isnan().all()
        assert torch.equal(mine[others], other[others])
        assert (mine[1] == 0).all()
    assert not forward[0][2]["is_top1"][2]
    options = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "discopop_tau": 0.05, "simpo_gamma": 0.5}
    losses, _, out = launch.dpo_fused(logits, targets, cu, None, 0.5, **options, out=torch.empty_like(logits))
    assert losses.isnan().tolist() == [False, True]
    assert out.isnan().any(1).tolist() == [False, False, True, False, False, True, True]


@pytest.mark.parametrize("kept", [False, True])
def test_residual_ignores_rows(kept, backend):
    """An ignored row is not read, even where it holds NaN; its log-prob, statistics and gradient are 0."""
    launch = resolve(backend, "cpu")
    logits = torch.randn(5, V)
    targets = torch.tensor([3, 9, 9, 5, 0])
    index = -100 if kept else 9
    targets[targets == 9] = index
    expected = logits.clone()
    seen = torch.tensor([0, 3, 4])
    rows = expected[seen]
    logps, stats = launch.residual_(rows, targets[seen], outputs=("entropy", "is_top1"))
    logits[1:3] = torch.nan
    found, found_stats = launch.residual_(logits, targets, ignore_index=index, outputs=("entropy", "is_top1"))
    assert torch.equal(found[seen], logps)
    assert torch.equal(logits[seen], rows)
    assert (found[1:3] == 0).all()
    assert (logits[1:3] == 0).all()
    for name, x in found_stats.items():
        assert torch.equal(x[seen], stats[name])
        assert (x[1:3] == 0).all()
