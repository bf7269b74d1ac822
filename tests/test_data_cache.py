"""Rows and tokens are kept in Arrow files: made once, made again when what they depend on changes, deleted by age."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pyarrow as pa
import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

from disk_tools import cache, fields, made_examples, quiet, random_rows, write  # noqa: E402, F401 - cache is a fixture
from tokenizer_tools import STRICT, TEMPLATE, chat_row, letters, make_tokenizer  # noqa: E402

from dpo_fast.data import cache as cache_files  # noqa: E402
from dpo_fast.data import sources  # noqa: E402
from dpo_fast.data.pairs import prepare  # noqa: E402
from dpo_fast.data.sources import load_pairs  # noqa: E402
from dpo_fast.data.tokenization import tokenize_pairs  # noqa: E402


def refuse(*_, **__):
    raise AssertionError("this was made already")


def test_rows_are_read_again_when_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write(path, random_rows(5))
    first = load_pairs(str(path), cache=True, log=quiet).rows
    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_row", refuse)
        assert load_pairs(str(path), cache=True, log=quiet).rows == first
        os.utime(path, (1, 1))  # another time, the same content
        assert load_pairs(str(path), cache=True, log=quiet).rows == first
        with pytest.raises(AssertionError):
            load_pairs(str(path), cache=True, skip_bad_rows=True, log=quiet)
    stat = path.stat()
    write(path, [row | {"chosen": row["chosen"].swapcase()} for row in random_rows(5)])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time
    assert load_pairs(str(path), cache=True, log=quiet).rows != first


def test_tokens_are_made_again_when_what_they_depend_on_changes(tmp_path, monkeypatch):
    rows = load_pairs(write(tmp_path / "a.jsonl", [chat_row("what", "is", "it")] * 3), cache=True, log=quiet).rows
    first = tokenize_pairs(rows, make_tokenizer(template=TEMPLATE), num_proc=2, log=quiet).examples
    used = make_tokenizer(template=TEMPLATE)
    used(["a call changes a tokenizer's state"], truncation=True, max_length=4)
    monkeypatch.setattr("dpo_fast.data.mapped.tokens_of", refuse)
    for num_proc in (1, 2):
        found = tokenize_pairs(rows, used, num_proc=num_proc, log=quiet).examples
        assert [fields(e) for e in found] == [fields(e) for e in first]
    for tokenizer, options in (
        (make_tokenizer(template=STRICT), {}),
        (make_tokenizer(bos=False, template=TEMPLATE), {}),
        (used, {"max_length": 7}),
        (used, {"vocab_size": 600}),
    ):
        with pytest.raises(AssertionError):
            tokenize_pairs(rows, tokenizer, log=quiet, **options)


def _load_and_count(path, count, start):
    def counted(*given):
        with open(count, "a") as file:
            file.write("x")
        return real(*given)

    real, sources.read_row = sources.read_row, counted
    start.wait()
    assert len(load_pairs(path, cache=True, log=quiet).rows) == 40


def test_of_several_processes_one_reads(tmp_path):
    path, count = write(tmp_path / "a.jsonl", random_rows(40)), tmp_path / "count"
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(3)
    processes = [fork.Process(target=_load_and_count, args=(path, count, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(count.read_text()) == 40


def test_ids_of_a_data_set_on_disk_are_cut_once_and_its_folder_is_left_alone(tmp_path, monkeypatch):
    from trainer_tools import config

    args = config(tmp_path, max_length=8)
    ids = [{k: e[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for e in made_examples()]
    datasets.Dataset.from_list(ids).save_to_disk(str(tmp_path / "mine"))
    before = sorted(os.listdir(tmp_path / "mine"))
    first = prepare(datasets.load_from_disk(str(tmp_path / "mine")), None, args, 100, "train")
    assert len(first) < len(ids)
    monkeypatch.setattr("dpo_fast.data.mapped.truncated_row", refuse)
    again = prepare(datasets.load_from_disk(str(tmp_path / "mine")), None, args, 100, "train")
    assert [fields(e) for e in again.examples] == [fields(e) for e in first.examples]
    assert sorted(os.listdir(tmp_path / "mine")) == before


def test_a_full_disk_is_said_and_nothing_stays_half_written(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", random_rows(30))

    def full(file, *_):
        file.write(b"x" * 100)
        assert list((tmp_path / "cache").rglob("*.part"))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.ipc, "new_stream", full)
    with pytest.raises(
        OSError, match=r"^the disk of .*/dpo_fast is full, .* MB are left: .*--prune DAYS.*HF_DATASETS_CACHE"
    ):
        load_pairs(path, log=quiet, cache=True)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_what_killed_runs_left_goes_and_the_rest_by_age(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", random_rows(30))
    rows = load_pairs(path, log=quiet, cache=True).rows
    tokenize_pairs(rows, letters(), log=quiet)
    first, second = (folder.path for folder in cache_files.folders())
    left = [first / "records.part", second / "tmpabc", second / "tmpdef"]
    for file in left:
        file.write_bytes(b"x" * 100)
    cache_files.sweep.cache_clear()
    with cache_files.locked(second / "lock"):  # somebody writes there
        assert cache_files.sweep() == 1
    assert [file.exists() for file in left] == [False, True, True]
    cache_files.sweep.cache_clear()
    write(tmp_path / "b.jsonl", random_rows(3))
    load_pairs(str(tmp_path / "b.jsonl"), log=quiet, cache=True)  # the next run sweeps
    assert not any(file.exists() for file in left)
    third = cache_files.folders()[-1].path
    week = time.time() - 7 * 86400
    for folder in (first, second):
        os.utime(folder / "lock", (week, week))
    load_pairs(path, log=quiet, cache=True)  # uses the first
    assert [f.path for f in cache_files.folders()] == [second, third, first]
    assert cache_files.main(["--prune", "6"]) == 0
    shown = capsys.readouterr().out
    assert "deleted 1 folders" in shown
    assert f"{tmp_path / 'cache/dpo_fast'}: " in shown
    assert not second.exists()
    assert [dict(r) for r in load_pairs(path, log=quiet, cache=True).rows] == list(rows)
    assert [f.path for f in cache_files.prune(0)] == [third, first]
    assert not list((tmp_path / "cache/dpo_fast/files").iterdir())
    with pytest.raises(SystemExit):
        cache_files.main(["--prune", "-1"])


def test_what_other_processes_rename_or_delete_is_passed_by(tmp_path, monkeypatch):
    """A run lists the folders while another one writes and prunes: nothing of that ends the run."""
    load_pairs(write(tmp_path / "a.jsonl", random_rows(30)), log=quiet, cache=True)
    (one,) = cache_files.folders()
    (one.path / "records.part").write_bytes(b"x" * 100)
    stat = Path.stat

    def gone(path, **options):
        if path.name == "records.part":
            raise FileNotFoundError(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", gone)
    assert cache_files.folders() == [one]
