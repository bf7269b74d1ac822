"""The checks before the first step: sharing is verified by running it, and a policy that is not its reference is said."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from model_families import build
from model_tools import EXAMPLE

from dpo_fast.forest import attention
from dpo_fast.forest.model import prepare_model
from dpo_fast.training import start_checks as verify


def test_verify_sharing():
    no_prompt = {"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [5]}
    for name in ("llama", "mistral", "stablelm"):
        model = build(name)
        plan = prepare_model(model)
        for share in ("prefix", "prompt", "none") if plan.share else ("none",):
            for example in (EXAMPLE, no_prompt):
                assert verify.verify_sharing(model, plan, [example], share) < 1e-5


def test_verify_sharing_finds_sabotage(monkeypatch):
    model = build("llama")
    plan = prepare_model(model)
    real = attention.block_attention

    def blind(query, key, value, forest, scale, *rest):
        """Every token sees all rows before it: `subtree_end` is ignored."""
        forest = copy.copy(forest)
        forest.spans, forest.parents, forest.cache = ((0, forest.rows),), (-1,), {}
        return real(query, key, value, forest, scale, *rest)

    monkeypatch.setattr(attention, "block_attention", blind)
    with pytest.raises(ValueError, match=r"verification failed: a token's log-prob differs by .* share='prefix'"):
        verify.verify_sharing(model, plan, [EXAMPLE], "prefix")
    monkeypatch.setattr(attention, "block_attention", real)
    forward = model.forward

    def one_token_off(**kwargs):
        out = forward(**kwargs)
        if "forest" in kwargs:
            out["token_logps"][3] += 2e-3
        return out

    model.forward = one_token_off
    with pytest.raises(ValueError, match=r"differs by 0\.002 nats"):
        verify.verify_sharing(model, plan, [EXAMPLE], "prefix")
    model.forward = forward
    monkeypatch.setattr(attention, "block_attention", lambda *args: real(*args) * float("nan"))
    with pytest.raises(ValueError, match="differs by nan"):
        verify.verify_sharing(model, plan, [EXAMPLE], "prefix")


def test_check_start(caplog):
    zero = torch.zeros(4)
    assert verify.check_start(zero, zero + 1e-4, low_precision=False)
    assert verify.check_start(zero, zero + 0.05, low_precision=True)
    assert not caplog.records
    assert not verify.check_start(zero, torch.tensor([0, 0, -3e-4, 0]), low_precision=False)
    assert not verify.check_start(zero, torch.tensor([0, 0.2, 0, 0]), low_precision=True)
    assert not verify.check_start(zero, zero * float("nan"), low_precision=True)
    assert "policy and reference differ before the first step" in caplog.text
