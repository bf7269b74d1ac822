"""Rows that no pair can be made of: what is refused or left out, and the words of each refusal."""

import pytest
from data_tools import CHAT, TEXT, bot, ranked, user

from dpo_fast.data.readers import DataError
from dpo_fast.data.sources import normalise_rows

BAD = [
    (TEXT | {"chosen": " 3"}, "'chosen' equals 'rejected'"),
    (TEXT | {"rejected": " \n"}, "'rejected' is empty"),
    (
        TEXT | {"chosen": None},
        r"columns: prompt, rejected \(null: chosen\)\. Known: prompt, chosen, rejected; .*alpaca",
    ),
    ({"question": "1+1?", "answer": "2"}, "no known layout has these columns: question, answer. Known: prompt"),
    (TEXT | {"chosen": 2}, "'chosen' must be text or a list of messages: found int"),
    (TEXT | {"chosen": [bot("2")]}, "one of 'chosen' and 'rejected' is text, the other messages"),
    (TEXT | {"chosen": "half \ud83d"}, "'chosen' holds half a surrogate"),
    (CHAT | {"prompt": []}, "'prompt' is empty"),
    (CHAT | {"chosen": [bot("")]}, "'chosen' is empty"),
    (CHAT | {"chosen": ["2"]}, "'chosen' must hold messages with role and content: found str"),
    (CHAT | {"chosen": [{"content": "2"}]}, "'chosen' has a message without a role"),
    (CHAT | {"chosen": [{"role": "assistant"}]}, "'chosen' has a message without a role or a content"),
    (CHAT | {"chosen": [bot([{"type": "image", "url": "x"}])]}, "'chosen' has a content part that is not text"),
    (CHAT | {"chosen": [user("1+1?"), bot("2")]}, "do not begin with the same message"),
    (CHAT | {"chosen": [user("x"), bot("2")], "rejected": [user("x"), bot("3")]}, "not those of 'prompt'"),
    (
        {"chosen": [user("a"), bot("b"), user("c")], "rejected": [user("a"), bot("b"), user("d")]},
        "'chosen' goes on with a user turn",
    ),
    ({"chosen": [bot("2")], "rejected": [bot("3")]}, "do not begin with the same message"),
    (CHAT | {"images": ["x.png"]}, "images"),
    (CHAT | {"tools": "{"}, "'tools' is not valid JSON"),
    (CHAT | {"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be a dict: found list"),
    ({"instruction": "x", "output": "y"}, r"'output' must be a list of two, \[best, worst\]"),
    ({"instruction": 1, "output": ["x", "y"]}, "'instruction' and 'input' must be text"),
    ({"instruction": "x", "output": ["x", "y"], "history": [None]}, "'history' must be a list"),
    (ranked(ranks=[0, 1]), "'ranks' must hold one number per completion: 4 completions"),
    (ranked(scores=[0, 1, float("nan"), 2]), "'scores' must hold one number"),
    (ranked(preferred_pairs=[[0, 4]]), "'preferred_pairs' must be .* indices below: 4"),
    ({"prompt": "x", "completions": "y", "ranks": [0]}, "'completions' must be a list"),
    (
        {"conversations": [{"from": "alien", "value": "x"}], "chosen": "a", "rejected": "b"},
        "'conversations' has an unknown sender, .*'alien'",
    ),
    (
        {
            "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "a"}],
            "chosen": "a",
            "rejected": "b",
        },
        "'conversations' must be messages that end before the reply",
    ),
    ("a string", "not an object of named columns: found str"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_are_named(row, message):
    with pytest.raises(DataError, match=message) as error:
        normalise_rows([row], where="mine")
    assert str(error.value).startswith("mine row 0")
    assert "skip_bad_rows" in str(error.value)
    good = CHAT if not isinstance(row, dict) or isinstance(row.get("prompt"), list) else TEXT
    pairs = normalise_rows([row, good], where="mine", skip_bad_rows=True)
    assert pairs.rows == [good]
    assert len(pairs.dropped) == 1
    assert pairs.dropped[0][0].startswith("mine row 0")


def test_text_mixed_with_messages_is_an_error_even_when_bad_rows_are_skipped():
    with pytest.raises(DataError, match="mixed: rows row 1 is text, rows row 0 is messages"):
        normalise_rows([CHAT, TEXT], skip_bad_rows=True)


def test_no_rows_left():
    with pytest.raises(DataError, match="no pair to train on"):
        normalise_rows([])
    with pytest.raises(DataError, match="'chosen' is empty"):
        normalise_rows([TEXT | {"chosen": ""}], skip_bad_rows=True)
