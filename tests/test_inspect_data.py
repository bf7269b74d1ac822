"""The report of --inspect_data: its marks, bars, counts and reasons."""

import random
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from dpo_fast.data.report import count_tokens, report
from dpo_fast.data.sources import Pairs, load_pairs
from dpo_fast.data.tokenization import TokenizedPairs, tokenize_pairs
from dpo_fast.forest.packing import PrefixForest

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


def make_report(**fields):
    pairs = Pairs(layout={"a.jsonl": "prompt, chosen, rejected as text"}, dropped=fields.pop("dropped", []))
    return report(pairs, TokenizedPairs(examples=EXAMPLES, **fields), Letters(), batch_size=2)


def test_marked_pair_and_layout():
    text = make_report()
    # The space belongs to the completion although decoding it alone would lose it.
    assert section(text, "First pair") == ["-- chosen (⟦scored⟧)", "ab⟦ cd⟧", "-- rejected (⟦scored⟧)", "ab⟦ cef⟧"]
    assert section(text, "Layout") == ["a.jsonl: prompt, chosen, rejected as text", "3 pairs to train on"]


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
    text = report(Pairs(), TokenizedPairs(examples=examples), Letters())
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
    lines = section(report(Pairs(), TokenizedPairs(EXAMPLES, lost), Letters()), "Left out")
    assert lines == ["2 dropped: the prompt fills max_length (row 4, row 6)"]


def test_token_counts_by_hand():
    assert count_tokens(EXAMPLES[:1], 1) == {"padded": 12, "packed": 11, "prompt shared": 9, "prefix shared": 7}
    # Both pairs of the first batch have one prompt; ab| cd appears twice.
    assert count_tokens(EXAMPLES, 2) == {
        "padded": 4 * 6 + 2 * 4,
        "packed": (5 + 6 + 3 + 5) + (4 + 2),
        "prompt shared": (2 + 3 + 4 + 1 + 3) + (1 + 3 + 1),
        "prefix shared": (2 + 3 + 2 + 1 + 0) + (1 + 3 + 1),
    }
    lines = section(make_report(), "Tokens in one epoch, batches of 2 pairs as they come")
    assert [line.split()[-5:-3] for line in lines] == [
        ["32", "1.00x"],
        ["25", "1.28x"],
        ["18", "1.78x"],
        ["13", "2.46x"],
    ]


def test_token_counts_are_those_of_the_forest():
    rng = random.Random(1)
    prompts = [[i] + [rng.randint(0, 1) for _ in range(rng.randint(0, 6))] for i in range(5)]

    def completion():
        return [rng.randint(0, 1) for _ in range(rng.randint(1, 9))]

    for _ in range(20):
        batch = [example(rng.choice(prompts), completion(), completion()) for _ in range(6)]
        counts = count_tokens(batch, 6)
        for share, name in (("none", "packed"), ("prompt", "prompt shared"), ("prefix", "prefix shared")):
            assert PrefixForest.from_pairs(batch, share=share, keep_last=True).rows == counts[name], share
        assert counts["padded"] == 12 * max(
            len(e["prompt_ids"]) + len(e[k]) for e in batch for k in ("chosen_ids", "rejected_ids")
        )


def test_refusals():
    with pytest.raises(ValueError, match="no tokenized pair"):
        report(Pairs(), TokenizedPairs(), Letters())
    with pytest.raises(ValueError, match="batch_size=0"):
        report(Pairs(), TokenizedPairs(examples=EXAMPLES), Letters(), batch_size=0)


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
    text = report(pairs, tokenized, tokenizer, batch_size=4)
    row = pairs.rows[0]
    for side in ("chosen", "rejected"):
        assert f"<assistant>⟦{row[side][0]['content']}</s>⟧" in text
    counts = count_tokens(tokenized.examples, 4)
    assert counts["padded"] > counts["packed"] > counts["prompt shared"] > counts["prefix shared"]
    assert f"{counts['prefix shared']:,}" in text
