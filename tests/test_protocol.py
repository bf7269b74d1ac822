"""Modules that are not from transformers: an LSTM language model through `HiddenStateModel`."""

import pytest
import torch

from dpo_fast.forest.gate import Plan, base_model, has_aux_loss, plan_model
from dpo_fast.forest.model import prepare_model, restore_model
from dpo_fast.forest.packing import PrefixForest
from dpo_fast.losses import preference_loss
from dpo_fast.training import start_checks as verify

VOCAB, D = 61, 12
PROMPTS = [[5, 9, 3, 7], [5, 9, 3, 7], [8, 1], [5, 9, 3, 7], [5, 9, 3, 7], [8, 1]]
COMPLETIONS = [[4, 6, 2, 9], [11], [3, 4], [4, 6, 10], [4, 6, 2, 9], [12, 13, 14, 15, 16]]


class LSTM(torch.nn.Module):
    """A language model that follows `HiddenStateModel`."""

    def __init__(self, carries_state=True, bias=True):
        super().__init__()
        self.carries_state = carries_state
        self.embed = torch.nn.Embedding(VOCAB, D)
        self.lstm = torch.nn.LSTM(D, D, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(D, VOCAB, bias=bias)
        self.calls = []

    def hidden_states(self, input_ids, state=None):
        assert self.carries_state or state is None
        self.calls.append(input_ids.shape[1])
        return self.lstm(self.embed(input_ids), state)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        return self.head(self.hidden_states(input_ids)[0])


def build(**options):
    model = LSTM(**options).double()
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=torch.float64) * 0.6
    return model


def objective(paths):
    """A DPO loss and a weighted sum of every token's log-prob; paths [S, C]."""
    chosen, rejected = paths.sum(1).view(2, -1)
    weights = torch.randn(paths.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return preference_loss(chosen, rejected, chosen.detach() + 1, rejected.detach()).loss + (paths * weights).sum()


def with_gradients(model, paths):
    return paths.detach(), *torch.autograd.grad(objective(paths), list(model.parameters()))


def own_paths(model):
    """Every sequence alone through the module's ordinary forward, [S, C]."""
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([prompt + completion])
        logps = model(ids)[0].log_softmax(-1)[len(prompt) - 1 : -1]
        picked = logps.gather(1, ids[0, len(prompt) :, None])[:, 0]
        rows.append(torch.nn.functional.pad(picked, (0, 5 - len(completion))))
    return torch.stack(rows)


def forest_paths(model, share):
    forest = PrefixForest.build(PROMPTS, COMPLETIONS, share=share)
    return forest.gather_paths(model(forest=forest)["token_logps"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("share", ["prefix", "prompt", "none"])
def test_shared_equals_unshared(share, bias):
    model = build(bias=bias)
    own = with_gradients(model, own_paths(model))
    assert prepare_model(model) == Plan("segments", None, plan_model(model).logits, share=True)
    for ours, theirs in zip(with_gradients(model, forest_paths(model, share)), own, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_state_of_a_prompt_is_carried_on():
    model = build()
    prepare_model(model)
    model.calls.clear()
    forest_paths(model, "prefix")
    forest = PrefixForest.build(PROMPTS, COMPLETIONS)
    assert model.calls == [end - start for start, end in forest.spans]
    assert sum(model.calls) == forest.rows < sum(map(len, PROMPTS))


def test_without_state_every_sequence_is_whole():
    model = build(carries_state=False)
    own = with_gradients(model, own_paths(model))
    plan = prepare_model(model)
    assert (plan.path, plan.share) == ("segments", False)
    for ours, theirs in zip(with_gradients(model, forest_paths(model, "none")), own, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for share in ("prompt", "prefix"):
        with pytest.raises(ValueError, match="carries no state: build its forest with share='none'"):
            forest_paths(model, share)


def test_a_missing_flag_means_no_state():
    model = build()
    del model.carries_state
    assert not plan_model(model).share


def test_ordinary_calls_and_restore():
    model, ids = build(), torch.tensor([PROMPTS[0]])
    before, attributes = model(ids), set(vars(model))
    prepare_model(model)
    assert torch.equal(model(ids), before)
    assert torch.equal(model(input_ids=ids), before)
    restore_model(model)
    assert set(vars(model)) == attributes
    with pytest.raises(TypeError):
        forest_paths(model, "none")
    assert not has_aux_loss(model)
    assert base_model(model) is model


def test_statistics_and_a_frozen_head():
    model = build()
    model.head.requires_grad_(False)
    prepare_model(model)
    forest = PrefixForest.build(PROMPTS, COMPLETIONS)
    out = model(forest=forest, outputs=("entropy", "is_top1"))
    logps = model(torch.tensor([PROMPTS[0] + COMPLETIONS[0]]))[0].log_softmax(-1)[3:-1]
    path = forest.path_index[0, :4]
    torch.testing.assert_close(out["entropy"][path], -(logps.exp() * logps).sum(-1))
    assert torch.equal(out["is_top1"][path], logps.argmax(-1) == torch.tensor(COMPLETIONS[0]))
    out["token_logps"].sum().backward()
    assert model.head.weight.grad is None
    assert model.embed.weight.grad.abs().sum() > 0


def test_verify_sharing():
    model = build()
    plan = prepare_model(model)
    example = {"prompt_ids": PROMPTS[0], "chosen_ids": COMPLETIONS[0], "rejected_ids": COMPLETIONS[3]}
    for share in ("prefix", "prompt", "none"):
        assert verify.verify_sharing(model, plan, [example], share) < 1e-10

    class Forgetful(LSTM):
        def hidden_states(self, input_ids, state=None):
            return super().hidden_states(input_ids, None)

    model = Forgetful().double()
    model.load_state_dict(build().state_dict())
    plan = prepare_model(model)
    with pytest.raises(ValueError, match="verification failed"):
        verify.verify_sharing(model, plan, [example], "prefix")


@pytest.mark.parametrize(
    ("methods", "missing"),
    [
        ((), "hidden_states"),
        (("get_output_embeddings",), "hidden_states"),
        (("hidden_states",), "get_output_embeddings"),
    ],
)
def test_a_module_without_the_methods(methods, missing):
    model = torch.nn.Linear(2, 2)
    for name in methods:
        setattr(model, name, lambda *args: None)
    with pytest.raises(ValueError, match=rf"Linear is not a transformers model and has no {missing}\(\): implement"):
        prepare_model(model)
    assert not hasattr(model, "_dpo_fast")
