"""Rotary frequencies that depend on the row's length: a row's log-probs do not depend on the rows beside it."""

import random

import pytest
import torch

pytest.importorskip("transformers")

import model_tools
from model_families import build
from model_tools import agree, paths_and_gradients

from dpo_fast.data.pairs import PairDataset
from dpo_fast.forest.gate import RopeRegime, plan_model
from dpo_fast.forest.model import prepare_model, reset_rope
from dpo_fast.forest.packing import PrefixForest
from dpo_fast.training.start_checks import verify_sharing, verify_start

# Lengths on both sides of the limits (32 and 64 tokens), and just at them.
LENGTHS = [(5, 3, 4), (20, 12, 13), (25, 40, 7), (60, 3, 4), (60, 5, 30), (28, 4, 36)]


def rows():
    rng = random.Random(1)
    ids = [[[rng.randrange(3, 61) for _ in range(n)] for n in sizes] for sizes in LENGTHS]
    return [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in ids]


def own(model, sequences):
    """Log-probs [S, C] of each sequence alone, the rotary frequencies as a new model has them."""
    found = []
    for prompt, completion in sequences:
        reset_rope(model)
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(logps.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("name", ["longrope", "dynamic rope"])
def test_a_long_row_beside_short_ones(name, keep_last, in_float64, monkeypatch):
    model, data = build(name), rows()
    sequences = [(e["prompt_ids"], e[side]) for side in ("chosen_ids", "rejected_ids") for e in data]
    longest = max(len(c) for _, c in sequences)
    weights = torch.randn(len(sequences), longest, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(model_tools, "coefficients", lambda: weights)
    truth = paths_and_gradients(model, own(model, sequences))
    plan = prepare_model(model)
    assert plan.path == "padded"
    forest = PrefixForest.from_pairs(data, share="none", keep_last=keep_last)
    for _ in range(2):  # what a dynamic model has seen before changes nothing
        agree(paths_and_gradients(model, forest.gather_paths(model(forest=forest)["token_logps"])), truth)
    for share in [data], [data[:1]], [data[::-1]]:
        assert verify_sharing(model, plan, share[0], "none") < 1e-9


def test_a_batch_without_regimes_is_found_by_the_check(in_float64, monkeypatch):
    model, data = build("longrope"), rows()
    plan = prepare_model(model)
    monkeypatch.setattr(RopeRegime, "of", lambda self, length: 0)
    with pytest.raises(ValueError, match="padded path"):
        verify_sharing(model, plan, data, "none")


@pytest.mark.parametrize("name", ["dynamic rope", "stablelm"])
def test_the_check_of_a_long_row_makes_few_logits(name, monkeypatch):
    """Whole rows where their length matters, else slices; a rejected prompt of its own (keep_end) is followed."""
    model = build(name)
    plan = prepare_model(model)
    rng = random.Random(0)
    prompt, chosen, rejected = ([rng.randrange(3, 60) for _ in range(n)] for n in (300, 200, 100))
    long = {"prompt_ids": prompt, "rejected_prompt_ids": prompt[90:], "chosen_ids": chosen, "rejected_ids": rejected}
    short = {"prompt_ids": prompt[:3], "chosen_ids": chosen[:5], "rejected_ids": rejected[:4]}
    rows, lengths = [], []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    verify_start(model, plan, PairDataset([long, short]), "none", deterministic=True)
    assert max(rows) == 33
    assert max(lengths) == (500 if plan.regimes else 96)


def test_regimes_of_one_kind_of_layer():
    rope = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    model = build("gemma3_text", rope_parameters=rope)
    plan = plan_model(model)
    assert plan.regimes == (RopeRegime("dynamic", 64),)
    assert [plan.regimes[0].of(n) for n in (1, 64, 65, 70)] == [0, 0, 65, 70]
    assert [RopeRegime("longrope", 64).of(n) for n in (64, 65, 70)] == [0, 1, 1]
    reset_rope(model)
