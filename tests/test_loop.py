"""The loop: a run of two rounds, and bad input."""

import dataclasses
import json
import math
import re

import pytest
import torch
from loop_tools import make_folder, settings, vowels
from tiny import sequence_logp

from dpo_fast.demo.questions import byte_tokenizer
from dpo_fast.loop import __main__ as command
from dpo_fast.loop import rounds
from dpo_fast.loop.items import read_candidates
from dpo_fast.loop.measure import sample_examples
from dpo_fast.loop.rounds import run_loop
from dpo_fast.loop.settings import AnnotateSection, GenerateSection, Limits, read_settings
from dpo_fast.loop.store import LabelStore


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def ran(place):
    """(history, what was said, settings) of two rounds with replay, against the first model."""
    said, options = [], settings(place, place / "ran", replay=1, reference="start")
    return run_loop(options, said.append), said, options


def test_a_round_holds_what_it_should(ran):
    history, _, options = ran
    assert [m["round"] for m in history] == [0, 1, 2]
    for number in (1, 2):
        names = {path.name for path in rounds.round_folder(options, number).iterdir()}
        assert {"candidates.jsonl", "labels.sqlite", "training_pairs.jsonl", "model", "metrics.json"} <= names
        assert {"report.html", "curves.png", "samples.jsonl"} <= names
        assert not any(name.endswith((".part", ".tmp")) for name in names)
    assert (options.folder / "best" / "model.safetensors").exists() or (options.folder / "best").is_dir()


def test_held_out_prompts_are_never_trained(ran):
    _, _, options = ran
    split = [json.loads(line) for line in (options.folder / "prompts.jsonl").read_text().splitlines()]
    held = {row["prompt"] for row in split if row["split"] == "heldout"}
    assert len(held) == 4
    for number in (1, 2):
        folder = rounds.round_folder(options, number)
        trained = {json.loads(x)["prompt"] for x in (folder / "training_pairs.jsonl").read_text().splitlines()}
        assert trained
        assert not trained & held
        assert {row["prompt"] for row in read_candidates(folder / "samples.jsonl")} == held
        with LabelStore(folder / "labels.sqlite") as store:
            assert {item.prompt for item in store.items("train")} & held == set()


def test_pairs_prefer_what_the_judge_prefers_and_are_replayed(ran):
    history, _, options = ran
    first, second = (
        [json.loads(x) for x in (rounds.round_folder(options, n) / "training_pairs.jsonl").read_text().splitlines()]
        for n in (1, 2)
    )
    for row in first + second:
        assert vowels(row["prompt"], row["chosen"]) > vowels(row["prompt"], row["rejected"])
    assert history[2]["replayed"] == len(first) == history[1]["pairs"]
    assert second[history[2]["pairs"] :] == first


def test_the_kl_is_that_of_the_samples(ran, place):
    from transformers import AutoModelForCausalLM

    history, _, options = ran
    folder, tokenizer, total, tokens = rounds.round_folder(options, 2), byte_tokenizer(), 0.0, 0
    models = [AutoModelForCausalLM.from_pretrained(p).eval() for p in (folder / "model", place / "model")]
    for example in sample_examples(read_candidates(folder / "samples.jsonl"), tokenizer):
        with torch.no_grad():
            ours, start = (float(sequence_logp(m, example["prompt_ids"], example["chosen_ids"])) for m in models)
        total, tokens = total + ours - start, tokens + len(example["chosen_ids"])
    assert history[2]["kl_start"] == pytest.approx(total / tokens, abs=1e-4)
    assert history[2]["entropy"] <= math.log(259)


def test_the_report_needs_nothing_beside_it(ran):
    _, _, options = ran
    page = (options.folder / "report.html").read_text()
    assert all(target.startswith("data:") for target in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert not re.search(r"(src|href)=[^\"]", page)
    assert "data:image/png;base64," in page
    assert (options.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<script" not in page


def test_a_loop_that_is_whole_is_read_and_more_rounds_go_on(ran, place):
    history, _, options = ran
    before = rounds.round_folder(options, 1).stat().st_mtime_ns
    assert run_loop(options, str) == history
    assert rounds.round_folder(options, 1).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "was begun with seed=0, now it is 1"),
        ({"train": {"beta": 0.5}}, "was begun with train="),
        ({"replay": 0}, "was begun with replay=1, now it is 0"),
        ({"heldout": 3}, "was begun with heldout=4, now it is 3"),
    ],
)
def test_a_folder_of_other_options_is_refused(ran, place, changes, message):
    options = settings(place, place / "ran", **{"replay": 1, "reference": "start", **changes})
    with pytest.raises(ValueError, match=message):
        run_loop(options, str)


def test_it_ends_early_and_keeps_the_best(place, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "win_rate", lambda *_: {"rate": 0.4, "low": 0.3, "high": 0.6, "prompts": 4})
    said = []
    history = run_loop(settings(place, tmp_path, rounds=5, patience=1), said.append)
    assert len(history) == 2
    assert any("ended early: no better win rate than round 0's in 1 rounds" in text for text in said)
    assert (tmp_path / "loop" / "best").resolve() == (place / "model").resolve()


def judged(place, tmp_path, judge, **changes):
    return run_loop(settings(place, tmp_path, annotate=AnnotateSection(judge=judge), rounds=1, **changes), str)


def raises(prompt, completion):
    raise RuntimeError("no battery")


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (raises, "raises raised RuntimeError: no battery"),
        (lambda prompt, completion: float("nan"), "gave NaN"),
        (lambda prompt, completion: 0.0, "prefers no completion"),
    ],
)
def test_a_judge_that_cannot_be_used(place, tmp_path, judge, message):
    with pytest.raises(ValueError, match=message):
        judged(place, tmp_path, judge)
    # What was sampled is kept.
    assert len(read_candidates(tmp_path / "loop" / "round-01.part" / "candidates.jsonl")) == 11


def test_completions_that_are_all_equal(place, tmp_path):
    greedy = GenerateSection(num_generations=3, temperature=[0.0], max_new_tokens=4)
    with pytest.raises(ValueError, match="two completions that differ"):
        judged(place, tmp_path, vowels, generate=greedy)


def test_two_processes_in_one_folder(place, tmp_path):
    import fcntl

    (tmp_path / "loop").mkdir()
    with open(tmp_path / "loop" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process works in"):
            judged(place, tmp_path, vowels)


BASE = {"model": "m", "prompts": "p.jsonl", "annotate": {"judge": "rule:f.py:f"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generat": {}}, "unknown option generat: did you mean generate"),
        ({"generate": {"temprature": 1}}, "generate: unknown option temprature: did you mean temperature"),
        ({"annotate": {}}, "nobody prefers"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"rounds": "3"}, "rounds must be a number"),
        ({"reference": "best"}, "reference='best' is not one of round, start"),
        ({"heldout": 0}, "heldout=0 is neither"),
        ({"train": {"output_dir": "x"}}, "train: output_dir is decided by the loop"),
        ({"generate": {"num_generations": 0}}, "num_generations must be at least 1"),
        ({"generate": 3}, "generate must be a section"),
        ({"model": None}, "no model"),
        ({"labels": {"method": "mean"}}, "method='mean' is not one of"),
    ],
)
def test_settings_that_cannot_work(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings({**BASE, **change})


def test_options_of_training_are_checked_before_anything_is_sampled(place, tmp_path):
    with pytest.raises(ValueError, match="did you mean beta"):
        run_loop(settings(place, tmp_path, train={"betta": 1}), str)
    assert not (tmp_path / "loop").exists()


def test_the_command_line(place, tmp_path, capsys):
    (tmp_path / "judge.py").write_text("def f(prompt, completion):\n    return len(set(completion))\n")
    config = {
        "model": str(place / "model"),
        "prompts": str(place / "prompts.jsonl"),
        "heldout": 4,
        "generate": {"num_generations": 2, "max_new_tokens": 5},
        "train": settings(place, tmp_path).train,
    }
    (tmp_path / "loop.yaml").write_text(json.dumps(config))
    arguments = ["--config", str(tmp_path / "loop.yaml"), "--output_dir", str(tmp_path / "out"), "--rounds", "1"]
    assert command.main(arguments) == 2
    assert "nobody prefers" in capsys.readouterr().err
    assert command.main([*arguments, "--judge", f"rule:{tmp_path}/judge.py:f"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"Look at the report: {tmp_path / 'out' / 'report.html'}")
    assert command.main([*arguments, "--judge", f"rule:{tmp_path}/none.py:f"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_more_rounds_or_other_limits_are_no_other_configuration(place):
    one, two = settings(place, place), dataclasses.replace(settings(place, place), rounds=9, limits=Limits(kl=1.0))
    assert one.identity() == two.identity()
