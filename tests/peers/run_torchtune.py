"""torchtune's recipe and DPO loss: ours from the YAML, against torchtune's own values.

python tests/peers/run_torchtune.py [CHECKOUT] [pytest options]    # torchtune is installed, or the checkout is what is imported

With a checkout its tests of DPOLoss run too, with ours under torchtune's name. Its last main branch (April 2026) needs torchao
0.18, torchdata and torchvision; its file of the loss uses names of typing that it does not import, so these are given to it here.
"""

import builtins
import dataclasses
import os
import sys
import typing
from pathlib import Path

if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
    builtins.dataclass = dataclasses.dataclass
    for name in ("Optional", "Tuple", "TypeVar"):
        setattr(builtins, name, getattr(typing, name))

import pytest
import torch
import torchtune_recipe
from omegaconf import OmegaConf
from torchtune import config, rlhf
from torchtune.rlhf import loss as theirs

from dpo_fast.integrations import torchtune as ours

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchtune_recipe.yaml"


def arguments(numbers):
    """As the version at hand takes them."""
    if hasattr(rlhf, "ChosenRejectedOutputs"):
        return [rlhf.ChosenRejectedOutputs(*pair, None, None) for pair in (numbers[:2], numbers[2:])]
    return numbers


def compare() -> None:
    loss = config.instantiate(OmegaConf.load(EXAMPLE).loss)
    assert type(loss) is ours.DPOLoss
    if hasattr(theirs.DPOLoss, "is_reference_free"):  # The main branch's recipes read it.
        assert loss.is_reference_free == theirs.DPOLoss().is_reference_free
    torch.manual_seed(0)
    for smoothing in (0.0, 0.2):
        values = [torch.randn(8, requires_grad=k < 2) for k in range(4)]
        found = []
        for module in (ours.DPOLoss(0.1, smoothing), theirs.DPOLoss(0.1, smoothing)):
            out = module(*arguments(values))
            found.append([*out, *torch.autograd.grad(out[0].mean(), values[:2])])
        torch.testing.assert_close(*found)
    logits, labels = torch.randn(4, 9, 31, requires_grad=True), torch.randint(31, (4, 9))
    labels[:, :3] = -100
    for average in (False, True):
        both = [
            f(logits, labels, return_average_logprobs=average)
            for f in (ours.get_batch_log_probs, rlhf.get_batch_log_probs)
        ]
        torch.testing.assert_close(*both)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in both))
    print("the YAML's line, DPOLoss and get_batch_log_probs: equal to torchtune's")


def main() -> int:
    compare()
    torchtune_recipe.compare()
    if len(sys.argv) == 1:
        return 0
    checkout, *options = sys.argv[1:]
    theirs.DPOLoss = ours.DPOLoss
    theirs.RSOLoss = lambda gamma: ours.DPOLoss(gamma, loss_type="hinge")
    test = str(Path(checkout) / "tests/torchtune/rlhf/loss/test_dpo_loss.py")
    common = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--noconftest", "-c", os.devnull, "--rootdir", checkout]
    return pytest.main([test, *common, "-k", "dpo", *options])


if __name__ == "__main__":
    sys.exit(main())
