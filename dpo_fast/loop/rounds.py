"""Rounds of generate, prefer and train, in one folder from which the loop can go on after a kill at any moment.

    loop.json       the options; a folder with other options is refused
    prompts.jsonl   the prompts, split once into train and heldout
    start/          samples of the first model on the held-out prompts, and what was measured on them
    round-01/       candidates.jsonl, labels.sqlite, training_pairs.jsonl, model/, samples.jsonl, metrics.json, report.html
    best            link to the model of the best round
    report.html     the report after the last round, and curves.png

A round is built in round-01.part, step by step: candidates are appended, each label is a transaction, and everything else
is written whole or not at all. The folder gets its name last and is not touched again.
"""

import fcntl
import gc
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from ..data.prompts import load_prompts
from .candidates import Prompt, write_whole
from .engines import check_name, folder_fingerprint, load, open_engine
from .generation import generate
from .items import read_candidates, read_gold
from .judges import Judge, make_judge
from .labelling import label_round
from .limits import warnings
from .measure import sample_examples, sequence_statistics, text_statistics, win_rate
from .report import write_report
from .round_training import train_round, training_options
from .sampling import Sampling
from .settings import Settings

_SERVER = ("concurrency", "retries", "timeout", "extra_body")


def run_loop(settings: Settings, log: Callable[[str], None] = print) -> list[dict]:
    """Run the loop and return the metrics of the start and of each round. Options and files are checked first.

    Finished rounds are kept, and one that was begun goes on. Raises ValueError for a folder of other options and while
    another process works in it, and whatever the steps raise.
    """
    check_name(settings.model)
    annotate = settings.annotate
    judge = make_judge(annotate.judge, **annotate.judge_options()) if annotate.judge is not None else None
    folder = settings.folder
    training_options(settings, settings.model, folder / "pairs.jsonl", folder / "checkpoints")
    if annotate.gold:
        read_gold(annotate.gold)
    if annotate.guidelines:
        Path(annotate.guidelines).read_text()
    prompts = load_prompts(settings.prompts, log=log)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process works in {folder}: wait for it, or name another output_dir") from None
        _check_folder(settings, prompts)
        return _run(settings, judge, _split(settings, prompts), log)


def _check_folder(settings: Settings, prompts: list) -> None:
    """Write the options, or compare them with those with which the folder was begun."""
    mark = folder_fingerprint(settings.model) if Path(settings.model).is_dir() else settings.model
    options = json.loads(json.dumps({**settings.identity(), "weights": mark, "number of prompts": len(prompts)}))
    path = settings.folder / "loop.json"
    if not path.exists():
        write_whole(path, json.dumps(options, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    for name in sorted(before.keys() | options.keys()):
        if before.get(name) != options.get(name):
            raise ValueError(
                f"{settings.folder} was begun with {name}={before.get(name)!r}, now it is {options.get(name)!r}: go on with "
                "the same options, or name another output_dir"
            )


def _split(settings: Settings, prompts: list) -> list[Prompt]:
    """The prompts, split once for all rounds. Raises ValueError where a side would be empty and for other prompts."""
    path, count = settings.folder / "prompts.jsonl", settings.heldout
    count = round(count * len(prompts)) if count < 1 else int(count)
    if not 0 < count < len(prompts):
        raise ValueError(f"heldout={settings.heldout:g} of {len(prompts)} prompts leaves one side empty")
    if not path.exists():
        held = set(random.Random(settings.seed).sample(range(len(prompts)), count))
        rows = [{"prompt": text, "split": "heldout" if i in held else "train"} for i, text in enumerate(prompts)]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    if [row["prompt"] for row in rows] != prompts:
        raise ValueError(f"{settings.prompts} holds other prompts than {path}: name another output_dir")
    return [Prompt(row["prompt"], row["split"]) for row in rows]


def _run(settings: Settings, judge: Judge | None, prompts: list[Prompt], log) -> list[dict]:
    history = [_start(settings, prompts, log)]
    for number in range(1, settings.rounds + 1):
        folder = round_folder(settings, number)
        if not folder.is_dir():
            log(f"\nround {number} of {settings.rounds}")
            _one_round(settings, judge, number, prompts, history, log)
        history.append(json.loads((folder / "metrics.json").read_text()))
        log(_line(history[-1]))
        for sentence in history[-1]["warnings"]:
            log(f"  warning: {sentence}")
        best = best_round(history)
        if settings.patience and judge is not None and number - best >= settings.patience:
            log(f"ended early: no better win rate than round {best}'s in {settings.patience} rounds (patience)")
            break
    _link_best(settings, best_round(history))
    write_report(settings.folder, settings, history, best_round(history))
    return history


def round_folder(settings: Settings, number: int) -> Path:
    """The folder of a finished round."""
    return settings.folder / f"round-{number:02d}"


def _model(settings: Settings, number: int) -> str:
    return settings.model if number == 0 else str(round_folder(settings, number) / "model")


def best_round(history: Sequence[dict]) -> int:
    """The round with the highest win rate against the start, the earliest if several have it; without a judge the last."""
    if len(history) == 1 or history[-1]["win_start"] is None:
        return len(history) - 1
    rates = [0.5] + [metrics["win_start"]["rate"] for metrics in history[1:]]
    return rates.index(max(rates))


def _link_best(settings: Settings, number: int) -> None:
    target = Path(settings.model).absolute() if number == 0 else Path(f"round-{number:02d}") / "model"
    link = settings.folder / "best.part"
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    link.rename(settings.folder / "best")


def _sample(settings: Settings, model: str, path: Path, prompts: list[Prompt], sampling: Sampling, number: int, log):
    """Write completions of `prompts` into the candidates file `path`."""
    options = settings.generate
    server = {name: getattr(options, name) for name in _SERVER if getattr(options, name) is not None}
    with open_engine(
        model,
        serve=options.serve,
        log_file=path.with_suffix(".server.log"),
        dtype=options.dtype,
        batch_size=options.batch_size,
        log=log,
        **server,
    ) as engine:
        generate(path, prompts, engine, sampling, round=number, log=log)
    gc.collect()


def _held_out(settings: Settings, model: str, folder: Path, prompts: list[Prompt], log) -> list[dict]:
    """One sample per held-out prompt, with the same random numbers in each round, so that only the weights differ."""
    longest = settings.evaluate.max_new_tokens or settings.generate.max_new_tokens
    stop = settings.generate.sampling(settings.seed).stop
    sampling = Sampling(1, max_new_tokens=longest, stop=stop, seed=settings.seed + 1)
    held = [prompt for prompt in prompts if prompt.split == "heldout"]
    _sample(settings, model, folder / "samples.jsonl", held, sampling, 0, log)
    return read_candidates(folder / "samples.jsonl")


def _start(settings: Settings, prompts: list[Prompt], log) -> dict:
    folder = settings.folder / "start"
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.json"
    if not path.exists():
        rows = _held_out(settings, settings.model, folder, prompts, log)
        metrics = {"round": 0, **_drift(settings, settings.model, settings.model, rows), "warnings": []}
        write_whole(path, json.dumps(metrics, indent=1) + "\n")
    return json.loads(path.read_text())


def _one_round(settings: Settings, judge, number: int, prompts, history, log) -> None:
    folder, before = round_folder(settings, number), _model(settings, number - 1)
    part = folder.with_name(folder.name + ".part")
    part.mkdir(exist_ok=True)
    sampling = settings.generate.sampling(settings.seed)
    _sample(settings, before, part / "candidates.jsonl", prompts, sampling, number, log)
    pairs, heldout = label_round(settings, part, before if number > 1 else None, log)
    new = len(pairs)
    for earlier in range(max(1, number - settings.replay), number):
        pairs += _new_pairs(round_folder(settings, earlier))
    reference = settings.model if settings.reference == "start" and number > 1 else None
    trained = train_round(settings, before, reference, pairs, heldout, part)
    after = str(part / "model")
    rows = _held_out(settings, after, part, prompts, log)
    metrics = {"round": number, "pairs": new, "replayed": len(pairs) - new, "heldout_pairs": len(heldout), **trained}
    metrics |= _drift(settings, after, settings.model, rows)
    metrics |= {"win_before": None, "win_start": None}
    if judge is not None:
        metrics["win_start"] = win_rate(judge, rows, _samples(settings, 0))
        metrics["win_before"] = win_rate(judge, rows, _samples(settings, number - 1))
    metrics["warnings"] = warnings(metrics, history[0], settings.limits)
    write_whole(part / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_report(part, settings, [*history, metrics], best_round([*history, metrics]))
    part.rename(folder)


def _new_pairs(folder: Path) -> list[dict]:
    """The pairs that a round labelled itself, without those that it replayed."""
    count = json.loads((folder / "metrics.json").read_text())["pairs"]
    rows = (folder / "training_pairs.jsonl").read_text().split("\n")
    return [json.loads(line) for line in rows[:count]]


def _samples(settings: Settings, number: int) -> list[dict]:
    folder = settings.folder / "start" if number == 0 else round_folder(settings, number)
    return read_candidates(folder / "samples.jsonl")


def _drift(settings: Settings, model: str, start: str, rows: list[dict]) -> dict:
    """Statistics of samples; `kl_start` is the mean log-ratio of policy and first model on them, in nats per token."""
    policy, tokenizer = load(model, "float32")
    examples = sample_examples(rows, tokenizer)
    logps, entropies, tokens = sequence_statistics(policy, examples)
    kl = 0.0
    if model != start:
        theirs, _, _ = sequence_statistics(load(start, "float32")[0], examples)
        kl = float((logps - theirs).sum()) / tokens
    return {**text_statistics(rows), "entropy": float(entropies.sum()) / tokens, "kl_start": kl}


def _line(m: dict) -> str:
    """A round in one line."""
    parts = [f"round {m['round']}: {m['pairs']} pairs"]
    if m["accuracy"] is not None:
        parts.append(f"held-out reward accuracy {m['accuracy']:.1%}, margin {m['margin']:.2f}")
    for name, against in (("win_before", "the round before"), ("win_start", "the start")):
        if m[name]:
            parts.append(f"wins {m[name]['rate']:.1%} [{m[name]['low']:.0%}, {m[name]['high']:.0%}] against {against}")
    return ", ".join([*parts, f"KL to the start {m['kl_start']:.3f} nats per token"])
