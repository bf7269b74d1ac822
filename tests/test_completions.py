"""What becomes of sampled completions: merged, stopped, marked and written; prompts and options that are refused."""

import dataclasses

import pytest
import torch
from generate_tools import MIXED, Ids, run
from tiny import llama

from dpo_fast.demo.questions import byte_tokenizer
from dpo_fast.loop.candidates import Prompt, merge_equal
from dpo_fast.loop.generation import generate
from dpo_fast.loop.in_process import InProcess
from dpo_fast.loop.items import read_candidates
from dpo_fast.loop.sampling import Sampling


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
