"""The loop: its measures against plain computations, a run of two rounds, its warnings, and bad input."""

import dataclasses
import json
import math
import random
import re

import pytest
import torch
from loop_tools import make_folder, settings, vowels
from tiny import llama, sequence_logp

from dpo_fast.demo.questions import byte_tokenizer
from dpo_fast.loop import __main__ as command
from dpo_fast.loop import rounds
from dpo_fast.loop.items import prompt_id, read_candidates
from dpo_fast.loop.judges import make_judge
from dpo_fast.loop.limits import warnings
from dpo_fast.loop.measure import sample_examples, sequence_statistics, text_statistics, wilson, win_rate
from dpo_fast.loop.rounds import best_round, run_loop
from dpo_fast.loop.settings import AnnotateSection, GenerateSection, Limits, read_settings
from dpo_fast.loop.store import LabelStore


def rows_of(texts, **changes):
    """Lines of a samples file, one per prompt p0, p1, ..."""
    completion = {"tokens": 3, "truncated": False, "empty": False, **changes}
    rows = [{"prompt": f"p{i}", "completions": [{**completion, "text": text}]} for i, text in enumerate(texts)]
    return [{**row, "id": prompt_id(row["prompt"]), "split": "heldout"} for row in rows]


# Measures.


def test_win_rate_asks_in_both_orders():
    judge = make_judge(lambda prompt, completion: len(completion))
    found = win_rate(judge, rows_of(["long", "a", "same", "xy"]), rows_of(["no", "long", "same", "zz"]))
    # A win, a loss, equal texts and a tie.
    assert (found["rate"], found["prompts"]) == (0.5, 4)


def test_a_judge_that_likes_the_left_side_gives_no_wins():
    judge = make_judge(lambda prompt, a, b: 1.0)
    assert win_rate(judge, rows_of("abc"), rows_of("xyz"))["rate"] == 0.5


def test_the_interval_holds_the_true_rate_in_nineteen_of_twenty():
    rng, hits = random.Random(0), 0
    for _ in range(2000):
        share = sum(rng.random() < 0.8 for _ in range(40)) / 40
        bounds = wilson(share, 40)
        hits += bounds["low"] <= 0.8 <= bounds["high"]
    assert 0.93 < hits / 2000 < 0.98
    assert wilson(1.0, 20)["low"] < 1.0 == wilson(1.0, 20)["high"]
    assert wilson(0.0, 20)["low"] == 0.0 < wilson(0.0, 20)["high"]


def test_log_probs_and_entropy_of_samples_are_those_of_the_plain_forward():
    model, tokenizer = llama(vocab_size=259).eval(), byte_tokenizer()
    rows = rows_of(["one", "another text", ""]) + rows_of(["cut"], truncated=True)
    examples = sample_examples(rows, tokenizer)
    # The end of a completion is scored with it, but not of one that was cut.
    assert [e["chosen_ids"][-1] == tokenizer.eos_token_id for e in examples] == [True, True, True, False]
    logps, entropies, tokens = sequence_statistics(model, examples)
    assert tokens == sum(len(e["chosen_ids"]) for e in examples) == 4 + 13 + 1 + 3
    for example, logp, entropy in zip(examples, logps, entropies, strict=True):
        prompt, ids = example["prompt_ids"], example["chosen_ids"]
        with torch.no_grad():
            assert float(logp) == pytest.approx(float(sequence_logp(model, prompt, ids)), rel=1e-6)
            logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        plain = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
        assert float(entropy) == pytest.approx(float(plain), rel=1e-6)


def test_statistics_of_texts():
    rows = rows_of(["a b c d a b c d", "a b c"])
    found = text_statistics(rows)
    # abcd bcda cdab dabc abcd: one of five came before; a text of three words has no 4-gram.
    assert found["repetition"] == pytest.approx(0.1)
    assert found["length"] == 3


# What is watched.

START = {"length": 20.0, "repetition": 0.0, "entropy": 2.0}
FINE = {
    "kl_start": 0.1, "length": 22.0, "repetition": 0.02, "entropy": 1.8, "chosen_delta": -2.0, "accuracy": 0.8,
    "train_accuracy": 0.85, "heldout_pairs": 100, "train_sample": 100, "win_before": {"rate": 0.6, "low": 0.5, "high": 0.7},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kl_start": 0.7}, "raise beta"),
        ({"length": 40.0}, "the judge may reward length"),
        ({"length": 8.0}, "the judge may reward length"),
        ({"repetition": 0.2}, "4-grams are repeated"),
        ({"entropy": 0.5}, "collapses"),
        ({"chosen_delta": -25.0}, "lost 25.0 nats"),
        ({"train_accuracy": 1.0}, "label_smoothing"),
        ({"win_before": {"rate": 0.2, "low": 0.1, "high": 0.3}}, "this round made it worse"),
    ],
)
def test_what_passes_a_limit_is_said_with_what_to_do(change, sentence):
    assert warnings(FINE, START, Limits()) == []
    said = warnings({**FINE, **change}, START, Limits())
    assert len(said) == 1
    assert sentence in said[0]


def test_a_limit_can_be_switched_off_and_chance_is_no_overfitting():
    assert warnings({**FINE, "kl_start": 9.0}, START, Limits(kl=None)) == []
    assert warnings({**FINE, "train_accuracy": 1.0, "heldout_pairs": 4}, START, Limits()) == []
    assert warnings({**FINE, "accuracy": None, "chosen_delta": None}, START, Limits()) == []


def test_the_best_round_is_the_one_with_the_highest_win_rate():
    def history(*rates):
        return [{}] + [{"win_start": rate if rate is None else {"rate": rate}} for rate in rates]

    assert [best_round(history(*r)) for r in [(), (0.4,), (0.6,), (0.6, 0.6), (0.6, 0.9, 0.7), (None, None)]] == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip


# A run.


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


# Bad input.


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
