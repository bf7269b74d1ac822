"""The engine in the process: its draws and log-probs against the model's plain forward, for models of several kinds."""

import pytest
import torch
from generate_tools import FAMILIES, MIXED, PROMPTS, Ids, family, run
from test_protocol import VOCAB as LSTM_VOCABULARY
from test_protocol import build as lstm
from tiny import llama

from dpo_fast.forest.model import prepare_model
from dpo_fast.loop.candidates import Prompt
from dpo_fast.loop.in_process import InProcess
from dpo_fast.loop.sampling import Sampler, Sampling


def plain(logits_of, prompt: list[int], settings, longest: int, ordered=False):
    """One completion, each step by a whole forward pass: ids and the sum of their log-probs.

    ordered: likeliest token first, as the sampler has it where any completion of the run has a top_p below 1.
    """
    temperature, top_p, seed = settings
    uniform = torch.rand(longest, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    ids, total = list(prompt), 0.0
    for u in uniform:
        logits = logits_of(ids).double()
        total_logps = logits.log_softmax(-1)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probs = (logits / temperature).softmax(-1).tolist()
            order = sorted(range(len(probs)), key=lambda i: -probs[i]) if ordered else range(len(probs))
            kept, mass = [], 0.0
            for i in order:
                if mass >= top_p:
                    break
                kept.append(i)
                mass += probs[i]
            at = 0.0
            for token in kept:
                at += probs[token]
                if at > u * mass:
                    break
        ids.append(token)
        total += float(total_logps[token])
        if token == 2:
            break
    return ids[len(prompt) :], total


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_and_log_probs_are_those_of_the_plain_forward(name):
    model = family(name)
    found = run(model, PROMPTS, MIXED, batch_size=16)

    def logits_of(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]

    for text, completions in found.items():
        assert len(completions) == 5
        for k, c in enumerate(completions):
            settings = MIXED.of(k, Prompt(text).id, 1)
            assert (c.temperature, c.top_p, c.seed) == settings
            ids, logp = plain(logits_of, Ids()(text)["input_ids"], settings, 9, True)
            assert c.text == Ids().decode(ids, True)
            assert c.tokens == len(ids)
            # The sampler reads logits as float32.
            assert c.logp == pytest.approx(logp, abs=1e-4)
            assert c.truncated == (ids[-1] != 2)
    assert set(found) == set(PROMPTS)


def test_rows_that_ended_leave_the_batch_and_change_nothing():
    """A model that ends often: most rows end at different steps."""
    model = llama().eval()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(61, dtype=torch.float64))
    model.lm_head.bias.data[2] = 2.0
    sampling = Sampling(num_generations=8, max_new_tokens=20)
    sizes = []
    model.register_forward_pre_hook(lambda m, a, kw: sizes.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    found = run(model, PROMPTS, sampling)
    lengths = {c.tokens for completions in found.values() for c in completions}
    assert len(lengths) > 4
    # The prefill sees each prompt once, not once per completion; then rows become fewer.
    assert sizes[0] == (4, 20)
    assert sizes[1][0] <= 32
    assert sizes[-1][0] <= 16
    model._forward_pre_hooks.clear()

    def logits_of(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]

    for text, completions in found.items():
        for k, c in enumerate(completions):
            ids, logp = plain(logits_of, Ids()(text)["input_ids"], sampling.of(k, Prompt(text).id, 1), 20)
            assert (c.text, c.logp) == (Ids().decode(ids, True), pytest.approx(logp, abs=1e-4))


@pytest.mark.parametrize("carries_state", [True, False])
def test_a_module_with_a_state_of_its_own(carries_state):
    model = lstm(carries_state=carries_state)
    found = run(model, PROMPTS, MIXED)
    assert LSTM_VOCABULARY == 61
    for text, completions in found.items():
        prompt = Ids()(text)["input_ids"]
        for k, c in enumerate(completions):
            with torch.no_grad():
                ids, logp = plain(
                    lambda ids: model(torch.tensor([ids]))[0, -1], prompt, MIXED.of(k, Prompt(text).id, 1), 9, True
                )
            assert (c.text, c.tokens) == (Ids().decode(ids, True), len(ids))
            assert c.logp == pytest.approx(logp, abs=1e-4)


def test_the_state_after_the_prompt_is_computed_once():
    model = lstm()
    model.calls.clear()
    run(model, ["a long prompt"], Sampling(num_generations=6, max_new_tokens=3))
    assert model.calls[0] == 14
    assert set(model.calls[1:]) == {1}


def test_what_else_is_in_the_batch_does_not_matter():
    model, sampling = llama().eval(), Sampling(num_generations=3, max_new_tokens=8)
    together = run(model, PROMPTS, sampling, batch_size=64)
    for text in PROMPTS:
        assert [c.text for c in run(model, [text], sampling, batch_size=1)[text]] == [c.text for c in together[text]]


def test_a_model_that_is_prepared_for_training_samples_the_same():
    sampling = Sampling(num_generations=3, max_new_tokens=8)
    model = llama().eval()
    before = run(model, PROMPTS, sampling)
    prepare_model(model)
    assert run(model, PROMPTS, sampling) == before


def test_the_models_own_generation_config_adds_no_penalty_and_is_kept():
    model = family("mamba")
    before = run(model, ["a"], MIXED)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 2
    assert run(model, ["a"], MIXED) == before
    assert model.generation_config.repetition_penalty == 5.0


def test_training_mode_is_as_before():
    model = llama().train()
    run(model, ["a"], MIXED)
    assert model.training


def test_draws_have_the_frequencies_of_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 12).expand(10_000, 12) * 2
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.3)):
        sampler = Sampler([(temperature, top_p, i) for i in range(10_000)], 1, torch.device("cpu"))
        tokens, logps = sampler.draw(logits, torch.arange(10_000), 0)
        probs, order = (logits[0] / temperature).softmax(-1).sort(descending=True)
        kept = probs.cumsum(0) - probs < top_p
        expected = torch.zeros(12).index_copy(0, order, (probs * kept) / (probs * kept).sum())
        seen = tokens.bincount(minlength=12) / 10_000
        # Four standard deviations of a share over 10,000 draws.
        assert ((seen - expected).abs() <= 4 * (expected * (1 - expected) / 10_000).sqrt() + 1e-9).all()
        assert torch.equal(logps, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_the_three_ways_are_taken():
    plans = {name: InProcess(family(name), Ids()).plan.path for name in ("llama", "mamba")}
    assert plans == {"llama": "shared", "mamba": "padded"}
    assert InProcess(lstm(), Ids()).plan.path == "segments"
