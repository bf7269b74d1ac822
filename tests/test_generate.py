"""The engine in the process: its draws and log-probs against the model's plain forward, for models of several kinds."""

import dataclasses

import pytest
import torch
from test_protocol import VOCAB as LSTM_VOCABULARY
from test_protocol import build as lstm
from tiny import llama
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_fast.demo.questions import byte_tokenizer
from dpo_fast.forest.model import prepare_model
from dpo_fast.loop.candidates import Prompt, merge_equal
from dpo_fast.loop.generation import generate
from dpo_fast.loop.in_process import InProcess
from dpo_fast.loop.items import read_candidates
from dpo_fast.loop.sampling import Sampler, Sampling

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 5},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"state_size": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "stablelm": {},
}
PROMPTS = ["", "a", "to b", "rather long, by far"]


class Ids:
    """A tokenizer of one id per character, so that every sampled id is seen in the text."""

    eos_token_id, chat_template = 2, None

    def __call__(self, text):
        return {"input_ids": [1, *(3 + ord(c) % 58 for c in text)]}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(0x100 + i) for i in ids if i > 2)


def family(name, seed=0):
    config = AutoConfig.for_model(name, **{**SIZES, **FAMILIES[name]})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng) * 0.3 + (0 if p.ndim > 1 else p.data)
    return model.double().eval()


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


def run(model, prompts, sampling, **options):
    engine = InProcess(model, Ids(), **options)
    return {p.text: c for p, c in engine.run([Prompt(p) for p in prompts], set(), sampling)}


MIXED = Sampling(num_generations=5, temperature=(1.0, 0.7, 0.0), top_p=(1.0, 0.8), max_new_tokens=9, seed=3)


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


def test_equal_completions_are_merged_and_counted():
    sampling = Sampling(num_generations=6, temperature=(0.0,), max_new_tokens=5)
    (completions,) = run(llama().eval(), ["a"], sampling).values()
    merged = merge_equal(completions)
    assert [(c.text, c.count, c.seed) for c in merged] == [(completions[0].text, 6, completions[0].seed)]
    a, b = completions[0], dataclasses.replace(completions[0], text="b")
    assert [(c.text, c.count) for c in merge_equal([b, a, b])] == [("b", 2), (a.text, 1)]


def test_a_stop_string_ends_the_text_before_it():
    sampling = Sampling(num_generations=4, max_new_tokens=12)
    (free,) = run(llama().eval(), ["a"], sampling).values()
    stop = free[0].text[3:5]
    (found,) = run(llama().eval(), ["a"], dataclasses.replace(sampling, stop=("never", stop))).values()
    assert found[0].text == free[0].text[: free[0].text.find(stop)]
    assert not found[0].truncated
    assert found[0].tokens == free[0].text.find(stop) + 2
    for before, after in zip(free, found, strict=True):
        if stop not in before.text:
            assert before == after


def test_empty_and_truncated_completions_are_kept_and_marked(tmp_path):
    model = llama().eval()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(61, dtype=torch.float64))
    model.lm_head.bias.data[2] = 3.0
    engine = InProcess(model, Ids())
    path = generate(tmp_path / "c.jsonl", [Prompt("a")], engine, Sampling(40, max_new_tokens=3), log=str)
    (row,) = read_candidates(path)
    empty = [c for c in row["completions"] if c["empty"]]
    assert [c["text"] for c in empty] == [""]
    assert empty[0]["count"] > 1
    assert empty[0]["tokens"] == 1
    assert any(c["truncated"] and c["tokens"] == 3 for c in row["completions"])
    assert sum(c["count"] for c in row["completions"]) == 40


def test_a_line_holds_what_the_format_says(tmp_path):
    engine = InProcess(llama().eval(), Ids())
    prompts = [Prompt("a"), Prompt("b", "heldout")]
    path = generate(tmp_path / "c.jsonl", prompts, engine, Sampling(2, max_new_tokens=3), round=4, log=str)
    rows = {row["prompt"]: row for row in read_candidates(path)}
    assert [rows[p]["split"] for p in "ab"] == ["train", "heldout"]
    assert set(rows["a"]) == {"id", "prompt", "completions", "round", "model", "split"}
    assert rows["a"]["id"] == Prompt("a").id
    assert (rows["a"]["round"], rows["a"]["model"]) == (4, engine.fingerprint)
    assert set(rows["a"]["completions"][0]) == {
        "text", "tokens", "logp", "temperature", "top_p", "seed", "truncated", "empty", "count",
    }  # fmt: skip


def test_messages_go_through_the_chat_template():
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "Hi"}]
    model = llama(vocab_size=259).eval()
    with pytest.raises(ValueError, match="no chat template"):
        list(InProcess(model, tokenizer).run([Prompt(messages)], set(), MIXED))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    seen = []
    model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["input_ids"].tolist()), with_kwargs=True)
    list(InProcess(model, tokenizer).run([Prompt(messages)], set(), MIXED))
    assert seen[0] == [tokenizer("user: Hi\nassistant:", add_special_tokens=False)["input_ids"]]


def test_a_prompt_too_long_for_the_model_is_refused_before_anything_is_sampled():
    model = llama().eval()
    model.register_forward_pre_hook(lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=r"'a{60}\.\.\.' has 124 tokens, and with max_new_tokens=9 it passes the mod"):
        run(model, ["a", "a" * 123], MIXED)


@pytest.mark.parametrize(
    "options",
    [
        {"num_generations": 0},
        {"max_new_tokens": 0},
        {"temperature": (-1.0,)},
        {"temperature": ()},
        {"top_p": (0.0,)},
        {"top_p": (1.1,)},
        {"temperature": (float("nan"),)},
        {"stop": ("",)},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
        Sampling(**options)


def test_the_three_ways_are_taken():
    plans = {name: InProcess(family(name), Ids()).plan.path for name in ("llama", "mamba")}
    assert plans == {"llama": "shared", "mamba": "padded"}
    assert InProcess(lstm(), Ids()).plan.path == "segments"
