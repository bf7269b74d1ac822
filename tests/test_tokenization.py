"""Token ids of prompt | chosen | rejected: by hand on a tiny tokenizer, and against TRL's own preparation."""

from pathlib import Path
from types import SimpleNamespace

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tokenizer_tools import OPTIONS, STRICT, TEMPLATE, THINKING, bot, chat_row, letters, make_tokenizer, text_row, user  # noqa: E402

from dpo_fast.data import tokenization as tokenize_module  # noqa: E402
from dpo_fast.data.readers import DataError  # noqa: E402
from dpo_fast.data.sources import load_pairs  # noqa: E402
from dpo_fast.data.tokenization import tokenize_pairs  # noqa: E402

SHARED = Path(__file__).parents[1] / "../shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")


def quiet(_):
    pass


def ids(example):
    return example["prompt_ids"], example["chosen_ids"], example["rejected_ids"]


def test_text_by_hand():
    # The EOS is appended once, and only where the text does not end with it.
    result = tokenize_pairs([text_row("ab", "c", "de</s>")], letters(), log=quiet)
    assert [ids(e) for e in result.examples] == [([0, 2, 3], [4, 1], [5, 6, 1])]
    assert (result.dropped, result.truncated, result.identical, result.warnings) == ([], 0, 0, [])


def test_messages_by_hand():
    tokenizer = letters()
    # No BOS is added to what the template writes.
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    row = chat_row("b", "c", "d")
    result = tokenize_pairs([row, row | {"prompt": [user("b"), bot("c"), user("d")]}], tokenizer, log=quiet)
    u = 22
    assert ids(result.examples[0]) == ([u, 3, 1, 2], [4, 1], [5, 1])
    assert ids(result.examples[1]) == ([u, 3, 1, 2, 4, 1, u, 5, 1, 2], [4, 1], [5, 1])


def test_prompt_ends_at_the_shorter_common_prefix():
    """A token that spans the boundary on one side only moves the boundary on both."""
    tokenizer = make_tokenizer(bos=False)
    prompt, chosen, rejected = "the sky i", "s blue", "!"
    alone, with_chosen, with_rejected = (
        tokenizer(t)["input_ids"] for t in (prompt, prompt + chosen + "</s>", prompt + rejected + "</s>")
    )
    assert with_chosen[: len(alone)] != alone, "the tokenizer must merge across the boundary here"
    n = next(i for i, (a, b) in enumerate(zip(alone, with_chosen, strict=False)) if a != b)
    lines = []
    result = tokenize_pairs([text_row(prompt, chosen, rejected)], tokenizer, log=lines.append)
    assert ids(result.examples[0]) == (alone[:n], with_chosen[n:], with_rejected[n:])
    assert lines == result.warnings
    assert "in 1 of 1 rows the prompt alone ends in other tokens" in lines[0]
    assert repr(tokenizer.decode(alone[n:])) in lines[0]


def test_truncation_and_dropping():
    rows = [
        text_row("ab", "cdef", "cdxy"),  # both cut to the same tokens
        text_row("ab", "c", "defg"),  # one cut
        text_row("abcd", "e", "f"),  # the prompt fills all five tokens
        text_row("abc", "e", "f"),  # one token left to each side: cut before the EOS
        text_row("a", "e", "f"),  # fits
    ]
    lines = []
    result = tokenize_pairs(rows, letters(), max_length=5, log=lines.append)
    assert [ids(e) for e in result.examples] == [
        ([0, 2, 3], [4, 5], [4, 5]),
        ([0, 2, 3], [4, 1], [5, 6]),
        ([0, 2, 3, 4], [6], [7]),
        ([0, 2], [6, 1], [7, 1]),
    ]
    assert result.dropped == [(2, "the prompt fills max_length: 5 tokens")]
    assert (result.truncated, result.identical) == (3, 1)
    assert lines == [
        "1 of 5 rows dropped: the prompt alone fills max_length=5",
        "3 of 5 pairs have a completion cut at max_length=5",
        "1 of 5 pairs have the same tokens on both sides: a margin loss learns nothing there",
    ]
    whole = tokenize_pairs(rows, letters(), max_length=None, log=quiet)
    assert [len(e["rejected_ids"]) for e in whole.examples] == [5, 5, 2, 2, 2]
    assert (whole.truncated, whole.dropped) == (0, [])


def test_batches_keep_the_order(monkeypatch):
    rows = [text_row("p" * (1 + i % 3), chr(97 + i), chr(98 + i)) for i in range(20)]
    rows[7] = text_row("p" * 50, "a", "b")
    whole = tokenize_pairs(rows, letters(), max_length=40, log=quiet)
    assert [i for i, _ in whole.dropped] == [7]
    assert [e["chosen_ids"] for e in whole.examples] == [[2 + i, 1] for i in range(20) if i != 7]
    monkeypatch.setattr(tokenize_module, "ROWS_A_CALL", 6)
    assert tokenize_pairs(rows, letters(), max_length=40, log=quiet) == whole


def test_mixed_rows_in_one_call_keep_their_own_rules():
    tokenizer = make_tokenizer(template=TEMPLATE)
    text, chat = text_row("the sky", " is blue", " is green"), chat_row("what?", "blue", "green")
    mixed = tokenize_pairs([chat, text, chat], tokenizer, log=quiet).examples
    alone = [tokenize_pairs([row], tokenizer, log=quiet).examples[0] for row in (chat, text)]
    assert mixed == [alone[0], alone[1], alone[0]]
    assert mixed[1]["prompt_ids"][0] == tokenizer.bos_token_id != mixed[0]["prompt_ids"][0]


def test_completion_without_a_token():
    # This template forgets the assistant's turns.
    tokenizer = make_tokenizer(template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    rows = [chat_row("what?", "blue", "green")]
    with pytest.raises(DataError, match="row 0: a completion has no token to score"):
        tokenize_pairs(rows, tokenizer, log=quiet)
    with pytest.raises(DataError, match=r"no pair is left of 1 rows.*no token to score"):
        tokenize_pairs(rows, tokenizer, skip_bad_rows=True, log=quiet)


def test_empty_prompt_needs_a_token_more():
    """Without a BOS the first token has no predecessor, so a completion of one token has nothing to score."""
    rows = [text_row("", "</s>", "a"), text_row("", "a", "b")]
    result = tokenize_pairs(rows, letters(bos=False), skip_bad_rows=True, log=quiet)
    assert result.dropped == [(0, "a completion has no token to score")]
    assert [ids(e) for e in result.examples] == [([], [2, 1], [3, 1])]
    assert len(tokenize_pairs(rows, letters(), log=quiet).examples) == 2


def test_row_that_the_template_refuses():
    tokenizer = make_tokenizer(template=STRICT)
    good = chat_row("what?", "blue", "green")
    bad = good | {"prompt": [{"role": "system", "content": "S"}, user("what?")]}
    with pytest.raises(DataError, match="row 1: the chat template refuses the messages: no system turn"):
        tokenize_pairs([good, bad], tokenizer, log=quiet)
    lines = []
    result = tokenize_pairs([good, bad, good], tokenizer, skip_bad_rows=True, log=lines.append)
    assert result.dropped == [(1, "the chat template refuses the messages: no system turn")]
    assert len(result.examples) == 2
    assert lines == [
        "1 of 3 rows dropped as unusable (first: row 1, the chat template refuses the messages: no system turn)"
    ]


def test_tokenizers_that_do_not_fit():
    chat, text = [chat_row("what?", "blue", "green")], [text_row("what?", "blue", "green")]
    with pytest.raises(ValueError, match=r"no chat template.*--chat_template_path FILE"):
        tokenize_pairs(chat, make_tokenizer(), log=quiet)
    tokenizer = make_tokenizer(template=TEMPLATE)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no EOS token.*set tokenizer\.eos_token"):
        tokenize_pairs(text, tokenizer, log=quiet)
    assert len(tokenize_pairs(chat, tokenizer, log=quiet).examples) == 1
    with pytest.raises(ValueError, match="max_length=1"):
        tokenize_pairs(text, make_tokenizer(), max_length=1, log=quiet)
    with pytest.raises(DataError, match="there are no rows"):
        tokenize_pairs([], make_tokenizer(), log=quiet)


def test_ids_that_the_model_does_not_have():
    rows = [text_row("ab", "c", "c"), text_row("ab", "c", "z")]
    with pytest.raises(ValueError, match=r"row 1: token 'z' has id 27, .* below 27 and the tokenizer holds 29.*resize"):
        tokenize_pairs(rows, letters(), vocab_size=27, log=quiet)
    assert len(tokenize_pairs(rows, letters(), vocab_size=28, log=quiet).examples) == 2


def test_two_bos_tokens_are_reported():
    rows = [text_row("<s>ab", "c", "d"), text_row("ab", "c", "d")]
    result = tokenize_pairs(rows, letters(), log=quiet)
    assert result.warnings == ["1 of 2 rows begin with two BOS tokens: remove the BOS text from the data"]


TEXT_ROWS = [
    text_row("the sky is", " blue", " green</s>"),
    text_row("the sky i", "s blue", "!"),
    text_row("the sea ", "is blue too", "is green"),
    text_row("", "the sky", "the sea"),
    text_row("</s>what is it?", "it is blue\n", "ünïcode 🙂"),
]
CHAT_ROWS = [
    chat_row("what is it?", "it is blue", "it is green"),
    {
        "prompt": [{"role": "system", "content": "the sky"}, user("is it?"), bot("it is"), user("blue?")],
        "chosen": [bot("it is"), user("is it?"), bot("yes")],
        "rejected": [bot("it is not")],
    },
    chat_row("the sky </s>", "blue", "blue\n\n"),
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
OPTION_ROWS = [chat_row("1+1?", "two", "three", tools=[TOOL], chat_template_kwargs={"style": "short"})]


def trl_examples(rows, tokenizer, max_length=None):
    """What TRL's DPOTrainer makes of the rows (its collator cuts at max_length)."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    datasets = pytest.importorskip("datasets")
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    dataset = datasets.Dataset.from_list(rows)
    prepared = trainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, args, "train")
    return [
        (e["prompt_ids"], *((e["prompt_ids"] + e[side])[:max_length][len(e["prompt_ids"]) :] for side in SIDES))
        for e in prepared
    ]


SIDES = ("chosen_ids", "rejected_ids")


@pytest.mark.parametrize("max_length", [None, 12])
@pytest.mark.parametrize(
    ("rows", "template"),
    [(TEXT_ROWS, None), (CHAT_ROWS, TEMPLATE), (CHAT_ROWS, THINKING), (OPTION_ROWS, OPTIONS)],
    ids=["text", "messages", "thinking", "options"],
)
@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no_bos"])
def test_same_ids_as_trl(rows, template, bos, max_length):
    tokenizer = make_tokenizer(bos=bos, template=template)
    expected = trl_examples(rows, tokenizer, max_length)
    assert expected or max_length
    if not expected:
        with pytest.raises(DataError, match="no pair is left"):
            tokenize_pairs(rows, tokenizer, max_length=max_length, log=quiet)
        return
    result = tokenize_pairs(rows, tokenizer, max_length=max_length, log=quiet)
    assert [ids(e) for e in result.examples] == expected
    assert len(result.dropped) == len(rows) - len(expected)


@needs_shared
def test_same_ids_as_trl_on_real_pairs():
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / "models/stories260k")
    tokenizer.chat_template = THINKING
    rows = load_pairs(str(SHARED / "data/oasst/test.jsonl"), log=quiet).rows[:40]
    expected = trl_examples(rows, tokenizer, 512)
    result = tokenize_pairs(rows, tokenizer, max_length=512, vocab_size=512, log=quiet)
    assert 10 < len(expected) < 40
    assert result.truncated
    assert [ids(e) for e in result.examples] == expected
