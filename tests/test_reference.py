"""The truth of the tests itself, against torch. Its losses: test_op_table.py compares them with the product's, and
test_losses.py compares those with TRL's numbers and with formulas of numbers.
"""

import torch

from dpo_fast import reference
from dpo_fast.loss_table import F_DIVERGENCES, LOSSES


def test_reference_token_logps():
    logits = torch.randn(3, 4, 7, dtype=torch.float64).requires_grad_()
    targets = torch.randint(7, (3, 4))
    targets[0, 1] = targets[2] = -100
    ours = reference.token_logps(logits, targets, temperature=0.8)
    theirs = -torch.nn.functional.cross_entropy(logits.transpose(1, 2) / 0.8, targets, reduction="none")
    torch.testing.assert_close(ours, theirs)
    assert ours[targets == -100].eq(0).all()
    (g,) = torch.autograd.grad(ours.sum(), logits)
    assert g[targets == -100].eq(0).all()


def test_reference_statistics_are_those_of_a_distribution():
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=rng, dtype=torch.float64) for n in (6, 9))
    targets = torch.randint(9, (6,), generator=rng)
    options = {"logit_scale": 0.5, "softcap": 2.0, "temperature": 1.3, "outputs": tuple(reference.STATISTICS)}
    logps, stats = reference.linear_token_logps(hidden, weight, targets, **options)
    logits = 2 * torch.tanh(hidden @ weight.T * 0.5 / 2)
    q = torch.distributions.Categorical(logits=logits / 1.3)
    torch.testing.assert_close(logps, q.log_prob(targets))
    torch.testing.assert_close(stats["entropy"], q.entropy())
    torch.testing.assert_close(stats["log_sum_sq_probs"], q.probs.square().sum(-1).log())
    torch.testing.assert_close(stats["mean_logits"], logits.mean(-1))
    assert torch.equal(stats["is_top1"], logits.argmax(-1) == targets)


def test_every_loss_and_divergence_has_its_formula():
    assert list(reference.FORMULAS) == list(LOSSES)
    assert list(reference.DIVERGENCES) == list(F_DIVERGENCES)
