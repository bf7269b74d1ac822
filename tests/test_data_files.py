"""Reading files, folders and names of the hub: what each kind becomes, and what is said of those that cannot be read."""

import gzip
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from data_tools import CHAT, TEXT, bot, user

from dpo_fast.data.readers import DataError, Source
from dpo_fast.data.sources import load_pairs
from dpo_fast.data.streamed import SourceRows

SHARED = Path(__file__).parents[1] / "../shared/data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")


def pair(i):
    return {"prompt": f"{i}+0=", "chosen": f"{i}", "rejected": f"{i}1"}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path, rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
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
