"""Reading files and layouts: what each layout becomes, what is refused, and the words of each refusal."""

import gzip
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from dpo_fast.data.readers import DataError, Source
from dpo_fast.data.sources import load_pairs, normalise_rows
from dpo_fast.data.streamed import SourceRows

SHARED = Path(__file__).parents[1] / "../shared/data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


TEXT = {"prompt": "Q: 1+1? A:", "chosen": " 2", "rejected": " 3"}
CHAT = {"prompt": [user("1+1?")], "chosen": [bot("2")], "rejected": [bot("3")]}
TWO_TURNS = [user("hi"), bot("hello"), user("1+1?")]

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


def ranked(**columns):
    return {"prompt": [user("1+1?")], "completions": [[bot(t)] for t in "abcd"], **columns}


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


def test_datasets_object():
    datasets = pytest.importorskip("datasets")
    # Arrow fills keys that only some messages have with null.
    rows = [CHAT, CHAT | {"chosen": [bot("2") | {"name": "Ada"}]}]
    assert normalise_rows(datasets.Dataset.from_list(rows)).rows == rows


# Files


def pair(i):
    return {"prompt": f"{i}+0=", "chosen": f"{i}", "rejected": f"{i}1"}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def prompts(pairs):
    return [int(row["prompt"].split("+")[0]) for row in pairs.rows]


def quiet(_):
    pass


def test_file_kinds(tmp_path):
    # U+2028 ends a line for str.splitlines and may stand in JSON.
    rows = [pair(0) | {"chosen": "a\u2028b é"}, pair(1)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode())
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8")
    (tmp_path / "d.json").write_text(text, encoding="utf-8")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    write_parquet(tmp_path / "f.parquet", rows)
    for file in sorted(tmp_path.iterdir()):
        assert load_pairs(str(file), log=quiet).rows == rows, file.name


def test_parquet_messages(tmp_path):
    rows = [CHAT, CHAT | {"chosen": [bot("4"), user("?"), bot("2")]}]
    assert load_pairs(write_parquet(tmp_path / "a.parquet", rows), log=quiet).rows == rows
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"b\.parquet is not a readable Parquet file"):
        load_pairs(str(tmp_path / "b.parquet"), log=quiet)


def test_broken_line_has_its_place(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{json.dumps(pair(0))}\n\n{{"prompt": "x",\n{json.dumps(pair(1) | {"chosen": ""})}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl line 3: the line is not valid JSON"):
        load_pairs(str(path), log=quiet)
    lines = []
    pairs = load_pairs(str(path), skip_bad_rows=True, log=lines.append)
    assert prompts(pairs) == [0]
    assert [place for place, _ in pairs.dropped] == [f"{path} line 3", f"{path} line 4"]
    assert pairs.dropped[1][1] == "'chosen' is empty"
    assert lines[0].startswith(f"{path}: 1 pairs, layout: prompt, chosen, rejected as text; 2 left out (first: {path}")


@pytest.mark.parametrize("text", ['[{"prompt": 1,\n]', "3", '{"data": 3}'])
def test_broken_json_file(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"a\.json (is not valid JSON: .*line 2|must hold a list)"):
        load_pairs(str(path), skip_bad_rows=True, log=quiet)


def test_directory_takes_the_files_of_the_split(tmp_path):
    write_lines(tmp_path / "train-00001-of-00002.jsonl", [pair(1)])
    write_lines(tmp_path / "train-00000-of-00002.jsonl", [pair(0)])
    write_lines(tmp_path / "test.jsonl", [pair(2)])
    write_lines(tmp_path / "train_extra.jsonl", [pair(3)])
    write_parquet(tmp_path / "data/train.parquet", [pair(4)])
    (tmp_path / "README.md").write_text("not data")
    assert prompts(load_pairs(str(tmp_path), log=quiet)) == [0, 1, 4]
    assert prompts(load_pairs(str(tmp_path), split="test", log=quiet)) == [2]
    assert prompts(load_pairs(Source(str(tmp_path), split="train_extra"), log=quiet)) == [3]
    with pytest.raises(DataError, match=r"no file of the split 'dev', found: test\.jsonl, .*train_extra\.jsonl"):
        load_pairs(str(tmp_path), split="dev", log=quiet)


def test_directory_without_splits_is_read_whole(tmp_path):
    write_lines(tmp_path / "b.jsonl", [pair(1)])
    write_lines(tmp_path / "a.jsonl", [pair(0)])
    (tmp_path / "dataset_info.json").write_text('{"pairs": {"file_name": "a.jsonl"}}')
    assert prompts(load_pairs(str(tmp_path), log=quiet)) == [0, 1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file ending in \.jsonl"):
        load_pairs(str(tmp_path / "empty"), log=quiet)


def test_weights(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(10)])
    b = write_lines(tmp_path / "b.jsonl", [pair(i) for i in range(10, 14)])
    pairs = load_pairs([Source(a, weight=0.5), Source(b, weight=2.0)], log=quiet)
    half, twice = prompts(pairs)[:5], prompts(pairs)[5:]
    assert len(set(half)) == 5
    assert set(half) <= set(range(10))
    assert half == sorted(half)
    assert twice == [10, 11, 12, 13] * 2
    assert list(pairs.layout) == [a, b]
    again = load_pairs([Source(b, weight=2.0), Source(a, weight=0.5)], log=quiet)
    assert prompts(again)[8:] == half, "the choice depends on the seed and the source, not on its place"
    seeds = {tuple(prompts(load_pairs(Source(a, weight=0.5), seed=seed, log=quiet))) for seed in range(5)}
    assert len(seeds) > 1
    assert len(load_pairs(Source(a, weight=1.3), log=quiet).rows) == 13
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight must be a positive number"):
            load_pairs(Source(a, weight=weight), log=quiet)


def test_sources_of_different_kinds(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", [TEXT])
    b = write_lines(tmp_path / "b.jsonl", [CHAT])
    with pytest.raises(DataError, match=r"mixed: .*a\.jsonl line 1 is text, .*b\.jsonl line 1 is messages"):
        load_pairs([a, b], log=quiet)


@pytest.mark.parametrize("path", ["pairs.jsonl", "./pairs", "/no/pairs", "a/b/c", "../pairs", "org/pairs.parquet"])
def test_missing_path(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # the hub must not be asked
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        load_pairs(path, log=quiet)


def test_options_without_effect_and_unknown_files(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [TEXT])
    with pytest.raises(ValueError, match="split and name have no effect"):
        load_pairs(Source(file, split="train"), log=quiet)
    with pytest.raises(ValueError, match="this is a directory"):
        load_pairs(Source(str(tmp_path), name="en"), log=quiet)
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(DataError, match=r"unknown kind of file, known are \.jsonl"):
        load_pairs(str(tmp_path / "a.csv"), log=quiet)


def test_hub_name(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    calls = []

    def load_dataset(path, name, *, split, streaming):
        calls.append((path, name, split))
        if path == "org/none":
            raise ConnectionError("no network")
        rows = datasets.Dataset.from_list([TEXT])
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pairs = load_pairs([Source("org/pairs-1.0", split="train_prefs", name="en"), "imdb"], split="test", log=quiet)
    assert pairs.rows == [TEXT, TEXT]
    assert calls == [("org/pairs-1.0", "en", "train_prefs"), ("imdb", None, "test")]
    with pytest.raises(DataError, match=r"org/none is neither a local path .*split 'train'.*no network"):
        load_pairs("org/none", log=quiet)
    stream = SourceRows([Source("org/pairs-1.0", name="en"), Source("imdb", split="dev")], "test")
    for _ in range(2):
        assert list(stream) == [("org/pairs-1.0 test row 0", TEXT), ("imdb dev row 0", TEXT)]


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


# Real data


@needs_data
@pytest.mark.parametrize(
    ("folder", "pairs"), [("oasst", 569), ("pandalm", 676), ("politeness", 982), ("stepwise", 208)]
)
def test_real_folders(folder, pairs):
    found = load_pairs(str(SHARED / folder), log=quiet)
    assert len(found.rows) == pairs
    assert list(found.layout.values()) == ["prompt, chosen, rejected as messages"]
    assert not found.dropped


@needs_data
def test_real_rankings_expand_to_the_pairs_file():
    def keys(pairs):
        return sorted(json.dumps(row, sort_keys=True) for row in pairs.rows)

    ranked_rows = load_pairs(str(SHARED / "oasst/rankings_train.jsonl"), log=quiet)
    assert keys(ranked_rows) == keys(load_pairs(str(SHARED / "oasst/train.jsonl"), log=quiet))
    # Pairs of one prompt stay together: 170 prompts, 170 runs.
    runs = [r["prompt"] for r in ranked_rows.rows]
    assert sum(a != b for a, b in pairwise(runs)) + 1 == 170
