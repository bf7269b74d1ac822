"""The report of --inspect_data: its marks, bars, counts and reasons."""

import random
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from dpo_fast.data.report import count_tokens, report
from dpo_fast.data.sources import Pairs, load_pairs
from dpo_fast.data.tokenization import tokenize_pairs
from dpo_fast.data.tokens import TokenizedPairs

SHARED = Path(__file__).parents[1] / "../shared"


class Letters:
    """Decodes id i as the i-th letter; like sentencepiece, drops the space (0) in front."""

    def decode(self, ids):
        return "".join(chr(96 + i) if i else " " for i in ids).removeprefix(" ")


def example(prompt, chosen, rejected):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


EXAMPLES = [
    example([1, 2], [0, 3, 4], [0, 3, 5, 6]),
    example([1, 2], [7], [0, 3, 4]),
    example([9], [1, 1, 1], [2]),
]


def section(text, title):
    body = text.split(f"== {title}")[1].split("\n\n== ")[0]
    return body.splitlines()[1:]


def in_batches(examples, size):
    """As they come, each batch one group."""
    return [[examples[i : i + size]] for i in range(0, len(examples), size)]


def make_report(**fields):
    pairs = Pairs(layout={"a.jsonl": "prompt, chosen, rejected as text"}, dropped=fields.pop("dropped", []))
    return report(pairs, TokenizedPairs(examples=EXAMPLES, **fields), Letters(), in_batches(EXAMPLES, 2))


def test_marked_pair_and_layout():
    text = make_report()
    # The space belongs to the completion although decoding it alone would lose it.
    assert section(text, "First pair") == ["-- chosen (⟦scored⟧)", "ab⟦ cd⟧", "-- rejected (⟦scored⟧)", "ab⟦ cef⟧"]
    assert section(text, "Layout") == ["a.jsonl: prompt, chosen, rejected as text", "3 pairs to train on"]


def test_a_budget_of_tokens_beside_a_number_of_pairs():
    pairs, found = Pairs(layout={"a.jsonl": "text"}), TokenizedPairs(examples=EXAMPLES)
    by_tokens = [[EXAMPLES[:2]], [EXAMPLES[2:]]]  # the prompt of the first two is computed once
    lines = section(report(pairs, found, Letters(), by_tokens, in_batches(EXAMPLES, 1)), "Tokens with tokens_per_step")
    with_, without = (count_tokens(batches)["prefix shared"] for batches in (by_tokens, in_batches(EXAMPLES, 1)))
    assert with_ < without
    assert [line.split() for line in lines[:2]] == [
        ["with", f"{with_ / 3:.1f}", *["per", "pair,", "1", "to", "2", "pairs", "in", "a", "batch"]],
        ["without", f"{without / 3:.1f}", *["per", "pair,", "1", "to", "1", "pairs", "in", "a", "batch"]],
    ]
    assert lines[2] == f"{1 - with_ / without:.1%} of the tokens saved"


def test_lengths():
    lines = section(make_report(), "Lengths")
    assert lines[0] == "prompt: min 1, median 2, max 2"
    assert [line.split() for line in lines[1:3]] == [["1-1", "1", "#" * 20], ["2-2", "2", "#" * 40]]
    assert lines[3] == "chosen: min 1, median 3, max 3"
    # An empty range keeps its line, without a bar.
    assert [line.split() for line in lines[4:7]] == [["1-1", "1", "#" * 20], ["2-2", "0"], ["3-3", "2", "#" * 40]]
    # Prompts twice: 10 of 10 + 7 + 8 tokens.
    assert lines[-1].startswith("prompt tokens: 40.0% of all tokens")


def test_wide_histogram_holds_every_pair():
    rng = random.Random(0)
    examples = [example([1] * rng.randint(1, 900), [1], [2]) for _ in range(200)]
    text = report(Pairs(), TokenizedPairs(examples=examples), Letters(), in_batches(examples, 8))
    lines = section(text, "Lengths")
    bars = [line.split() for line in lines[1 : lines.index("chosen: min 1, median 1, max 1")]]
    assert len(bars) == 8
    assert sum(int(count) for _, count, *_ in bars) == 200
    for name, count, *_ in bars:
        low, high = map(int, name.split("-"))
        assert int(count) == sum(low <= len(e["prompt_ids"]) <= high for e in examples)


def test_left_out_is_grouped_by_reason():
    dropped = [(f"a.jsonl line {i}", "'chosen' is empty") for i in range(5)]
    dropped.append(("a.jsonl line 9", "the line is not valid JSON: column 3"))
    lost = [(4, "the prompt fills max_length: 50 tokens"), (6, "the prompt fills max_length: 51 tokens")]
    text = make_report(dropped=dropped, warnings=["careful"])
    assert section(text, "Left out") == [
        "5 dropped: 'chosen' is empty (a.jsonl line 0, a.jsonl line 1, a.jsonl line 2, ...)",
        "1 dropped: the line is not valid JSON (a.jsonl line 9)",
    ]
    assert section(text, "Warnings") == ["careful"]
    text = make_report(dropped=[])
    assert section(text, "Left out") == ["no row dropped"]
    assert section(text, "Warnings") == ["none"]
    lines = section(report(Pairs(), TokenizedPairs(EXAMPLES, lost), Letters(), in_batches(EXAMPLES, 2)), "Left out")
    assert lines == ["2 dropped: the prompt fills max_length (row 4, row 6)"]


def test_token_counts_by_hand():
    # The last token of each sequence predicts nothing: it is not computed.
    assert count_tokens(in_batches(EXAMPLES[:1], 1)) == {
        "padded": 12, "packed": 11, "prompt shared": 9 - 2, "prefix shared": 7 - 2,
    }  # fmt: skip
    # Both pairs of the first batch have one prompt; ab| cd appears twice.
    assert count_tokens(in_batches(EXAMPLES, 2)) == {
        "padded": 4 * 6 + 2 * 4,
        "packed": (5 + 6 + 3 + 5) + (4 + 2),
        "prompt shared": (2 + 3 + 4 + 1 + 3 - 4) + (1 + 3 + 1 - 2),
        "prefix shared": (2 + 3 + 2 + 1 + 0 - 3) + (1 + 3 + 1 - 2),
    }
    lines = section(make_report(), "Tokens in all batches of an epoch (of 2 pairs, in training's order)")
    assert lines[0].split() == ["padded", "32"]
    assert lines[1].split() == ["packed", "25", "1.28x", "fewer", "than", "padded"]
    assert "2.67x fewer than padded, 2.08x fewer than packed (perf/tokens_saved 52.0%)" in lines[2]
    assert "4.00x fewer than padded, 3.12x fewer than packed (perf/tokens_saved 68.0%)" in lines[3]


def pairs_per_prompt(count):
    """Many pairs of few prompts, side by side in the file, all behind one system prompt of 20 tokens."""
    rng = random.Random(2)
    prompts = [[3] * 20 + [rng.randint(4, 50) for _ in range(15)] for _ in range(count // 8)]
    return [
        example(prompts[i // 8], *([rng.randint(4, 50) for _ in range(rng.randint(2, 9))] for _ in range(2)))
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "changes",
    [{}, {"seed": 7}, {"data_seed": 3}, {"train_sampling_strategy": "sequential"}, {"max_tokens_per_batch": 110}],
)
def test_the_report_counts_what_training_computes(tmp_path, changes):
    """The order, tokens and tokens saved of an epoch of training are those that the report announced."""
    import tiny
    from test_resume_agrees import options

    from dpo_fast import DPOConfig, DPOTrainer
    from dpo_fast.training.batches import training_batches

    rows = pairs_per_prompt(32)
    common = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    args = DPOConfig(**options(tmp_path, max_steps=-1, num_train_epochs=1, **common, **changes))
    batches = training_batches(rows, args)
    trainer = DPOTrainer(tiny.llama(), args=args, train_dataset=rows)
    order = [i for batch in trainer.get_train_dataloader() for part in batch["parts"] for i in part.index.tolist()]
    assert [e for batch in batches for group in batch for e in group] == [rows[i] for i in order]
    trainer.train()
    counts = count_tokens(batches)
    totals = trainer.throughput.totals()
    assert totals["tokens_saved"] == pytest.approx(1 - counts["prefix shared"] / counts["packed"])
    assert totals["tokens_saved_of_padded"] == pytest.approx(1 - counts["prefix shared"] / counts["padded"])
    assert trainer.state.num_input_tokens_seen == counts["packed"]


def test_no_batch_is_made_before_it_is_counted(tmp_path, monkeypatch):
    """Nor kept after it, nor more of them than are counted; a second pass has the same batches."""
    from test_resume_agrees import options

    from dpo_fast import DPOConfig
    from dpo_fast.data import report as module
    from dpo_fast.training.batches import training_batches

    class Recorded(list):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    read, rows = [], Recorded(pairs_per_prompt(32))
    batches = training_batches(rows, DPOConfig(**options(tmp_path, per_device_train_batch_size=4)))
    assert len(batches) == 8
    assert not read
    passed = iter(batches)
    next(passed)
    assert len(read) == 4
    assert list(batches) == list(batches)
    monkeypatch.setattr(module, "BATCHES", 3)
    read.clear()
    assert "== Tokens in the first 3 of 8 batches" in report(Pairs(), TokenizedPairs(list(rows)), Letters(), batches)
    assert len(read) == 12


def test_refusals():
    with pytest.raises(ValueError, match="no tokenized pair"):
        report(Pairs(), TokenizedPairs(), Letters(), [])


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
def test_report_on_real_pairs():
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / "models/stories260k")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    pairs = load_pairs(str(SHARED / "data/politeness/test.jsonl"), log=lambda _: None)
    tokenized = tokenize_pairs(pairs.rows, tokenizer, log=lambda _: None)
    batches = in_batches(tokenized.examples, 4)
    text = report(pairs, tokenized, tokenizer, batches)
    row = pairs.rows[0]
    for side in ("chosen", "rejected"):
        assert f"<assistant>⟦{row[side][0]['content']}</s>⟧" in text
    counts = count_tokens(batches)
    assert counts["padded"] > counts["packed"] > counts["prompt shared"] > counts["prefix shared"]
    assert f"{counts['prefix shared']:,}" in text
