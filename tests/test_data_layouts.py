"""Layouts: what a row of each becomes, and the pairs of completions with ranks."""

import json

import pytest
from data_tools import CHAT, TEXT, TWO_TURNS, bot, ranked, system, user

from dpo_fast.data.readers import DataError
from dpo_fast.data.sources import normalise_rows

# name, row, part of the layout's name, the pair it becomes
LAYOUTS = [
    ("text", TEXT, "prompt, chosen, rejected as text", TEXT),
    ("messages", CHAT, "prompt, chosen, rejected as messages", CHAT),
    ("single message", CHAT | {"chosen": bot("2"), "rejected": bot("3")}, "as messages", CHAT),
    ("message prompt, text replies", CHAT | {"chosen": "2", "rejected": "3"}, "replies as text", CHAT),
    ("text prompt, message replies", CHAT | {"prompt": "1+1?"}, "prompt as text", CHAT),
    (
        "conversations without prompt",
        {"chosen": [*TWO_TURNS, bot("2")], "rejected": [*TWO_TURNS, bot("3")]},
        "chosen, rejected without prompt as whole conversations",
        {"prompt": TWO_TURNS, "chosen": [bot("2")], "rejected": [bot("3")]},
    ),
    (
        "null prompt",
        {"prompt": None, "chosen": [user("1+1?"), bot("2")], "rejected": [user("1+1?"), bot("3")]},
        "without prompt as whole conversations",
        CHAT,
    ),
    (
        "one conversation goes on",
        {"chosen": [user("1+1?"), bot("2"), user("sure?"), bot("yes")], "rejected": [user("1+1?"), bot("2")]},
        "whole conversations",
        {"prompt": [user("1+1?")], "chosen": [bot("2"), user("sure?"), bot("yes")], "rejected": [bot("2")]},
    ),
    (
        "ultrafeedback_binarized",
        {
            "prompt": "1+1?",
            "prompt_id": "a",
            "chosen": [user("1+1?"), bot("2")],
            "rejected": [user("1+1?"), bot("3")],
            "messages": [user("1+1?"), bot("2")],
            "score_chosen": 8.0,
        },
        "whole conversations that repeat the text prompt",
        CHAT,
    ),
    (
        "prompt repeated",
        CHAT | {"chosen": [user("1+1?"), bot("2")], "rejected": [user("1+1?"), bot("3")]},
        "prompt repeated in the completions (stripped)",
        CHAT,
    ),
    (
        "prompt repeated without its system turn",
        {
            "prompt": [system("S"), user("1+1?")],
            "chosen": [user("1+1?"), bot("2")],
            "rejected": [user("1+1?"), bot("3")],
        },
        "(stripped)",
        CHAT | {"prompt": [system("S"), user("1+1?")]},
    ),
    (
        "prompt repeated with more in front",
        CHAT | {"chosen": [system("S"), user("1+1?"), bot("2")], "rejected": [system("S"), user("1+1?"), bot("3")]},
        "(stripped)",
        CHAT | {"prompt": [system("S"), user("1+1?")]},
    ),
    (
        "repeated prompt, replies with a common first turn",
        CHAT
        | {
            "chosen": [user("1+1?"), bot("?"), user("?"), bot("2")],
            "rejected": [user("1+1?"), bot("?"), user("?"), bot("3")],
        },
        "(stripped)",
        CHAT | {"chosen": [bot("?"), user("?"), bot("2")], "rejected": [bot("?"), user("?"), bot("3")]},
    ),
    (
        "text without prompt",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "their common beginning is the prompt",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    ),
    (
        "text without prompt or common beginning",
        {"chosen": "blue ", "rejected": "green "},
        "their common beginning is the prompt",
        {"prompt": "", "chosen": "blue ", "rejected": "green "},
    ),
    (
        "sharegpt",
        {
            "system": "S",
            "conversations": [{"from": "human", "value": "1+1?"}],
            "chosen": {"from": "gpt", "value": "2"},
            "rejected": {"from": "gpt", "value": "3"},
        },
        "sharegpt",
        CHAT | {"prompt": [system("S"), user("1+1?")]},
    ),
    (
        "sharegpt with text replies",
        {"conversations": [{"from": "human", "value": "1+1?"}], "chosen": "2", "rejected": "3"},
        "sharegpt",
        CHAT,
    ),
    ("alpaca", {"instruction": "Add.", "input": "1+1", "output": ["2", "3"]}, "alpaca", [user("Add.\n1+1")]),
    ("alpaca without input", {"instruction": "1+1?", "input": "", "output": ["2", "3"]}, "alpaca", CHAT),
    (
        "alpaca, two columns",
        {"instruction": "1+1?", "chosen": "2", "rejected": "3", "history": [["hi", "hello"]], "system": "S"},
        "alpaca",
        [system("S"), *TWO_TURNS],
    ),
    (
        "text content in parts, null entries",
        CHAT | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}], "tool_calls": None}]},
        "as messages",
        CHAT,
    ),
]


@pytest.mark.parametrize(("row", "layout", "expected"), [case[1:] for case in LAYOUTS], ids=[c[0] for c in LAYOUTS])
def test_layouts(row, layout, expected):
    before = json.dumps(row)
    pairs = normalise_rows([row])
    expected = CHAT | {"prompt": expected} if isinstance(expected, list) else expected
    assert pairs.rows == [expected]
    assert layout in pairs.layout["rows"]
    assert pairs.dropped == []
    assert json.dumps(row) == before, "the caller's row was changed"


def test_tools_and_template_options_are_carried():
    tool = {"type": "function", "function": {"name": "add"}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    row = CHAT | {"chosen": [call], "tools": json.dumps([tool]), "chat_template_kwargs": {"think": False}}
    assert normalise_rows([row]).rows == [
        CHAT | {"chosen": [call], "tools": [tool], "chat_template_kwargs": {"think": False}}
    ]


def test_datasets_object():
    datasets = pytest.importorskip("datasets")
    # Arrow fills keys that only some messages have with null.
    rows = [CHAT, CHAT | {"chosen": [bot("2") | {"name": "Ada"}]}]
    assert normalise_rows(datasets.Dataset.from_list(rows)).rows == rows


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "abc", "rejected": "abd"},
        {"chosen": "ab c", "rejected": "ab c d"},
        {"chosen": [*TWO_TURNS, bot("2")], "rejected": [*TWO_TURNS, bot("3")]},
        {"chosen": [user("a"), bot("b"), user("c"), bot("d")], "rejected": [user("a"), bot("b")]},
    ],
)
def test_implicit_prompt_is_that_of_trl(row):
    extract_prompt = pytest.importorskip("trl.data_utils").extract_prompt
    assert normalise_rows([row]).rows == [extract_prompt(row)]


def order(pairs):
    return [row["chosen"][0]["content"] + row["rejected"][0]["content"] for row in pairs.rows]


@pytest.mark.parametrize(
    ("columns", "everything", "best_worst"),
    [
        ({"ranks": [2, 0, 1, 3]}, ["bc", "ba", "bd", "ca", "cd", "ad"], ["bd"]),
        ({"ranks": [0, 0, 1, 1]}, ["ac", "ad", "bc", "bd"], ["ad"]),
        ({"scores": [0.5, 0.1, 0.9, 0.5]}, ["ca", "cd", "cb", "ab", "db"], ["cb"]),
    ],
)
def test_ranked_completions(columns, everything, best_worst):
    assert order(normalise_rows([ranked(**columns)])) == everything
    assert order(normalise_rows([ranked(**columns)], ranking_pairs="best_worst")) == best_worst


def test_preferred_pairs():
    row = ranked(preferred_pairs=[[2, 0], [0, 3]])
    assert order(normalise_rows([row])) == ["ca", "ad"]
    with pytest.raises(ValueError, match="best_worst"):
        normalise_rows([row], ranking_pairs="best_worst")
    with pytest.raises(ValueError, match="not one of all, best_worst"):
        normalise_rows([row], ranking_pairs="some")


def test_ranked_text_and_ties():
    row = {"prompt": "1+1=", "completions": ["2", "3", "4"], "ranks": [0, 1, 1]}
    pairs = normalise_rows([row, row | {"ranks": [5, 5, 5]}])
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in pairs.rows] == [("1+1=", "2", "3"), ("1+1=", "2", "4")]
    assert pairs.dropped == [("rows row 1", "no completion ranks above another")]


def test_one_bad_pair_does_not_cost_the_ranking():
    row = ranked(ranks=[0, 1, 2, 3])
    row["completions"][3] = [bot("a")]
    with pytest.raises(DataError, match="row 0 completions 0 > 3: 'chosen' equals 'rejected'"):
        normalise_rows([row])
    pairs = normalise_rows([row], skip_bad_rows=True)
    assert order(pairs) == ["ab", "ac", "bc", "ba", "ca"]
    assert pairs.dropped == [("rows row 0 completions 0 > 3", "'chosen' equals 'rejected'")]
