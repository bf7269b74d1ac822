"""Labels become training data: pairs in TRL's layout with one soft label each, or rankings."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from .aggregate import posteriors
from .judges import reply
from .store import LabelStore


def export_pairs(
    store: LabelStore,
    *,
    method: str = "dawid_skene",
    split: str = "train",
    min_p: float = 0.5,
    annotators: Iterable[str] | None = None,
    log: Callable[[str], None] = print,
) -> list[dict]:
    """One row per labelled pair, in the order of the items.

    A row holds `prompt`, `chosen` and `rejected` (TRL's layout: text or messages, like the prompt), `p_chosen` (0.5 to 1,
    the probability that `chosen` is the better one, see aggregate.py), `n_labels`, `annotators` and `id`. A pair whose
    p_chosen is one half or below `min_p` is left out, and so is one that most annotators called bad on both sides. With
    `annotators` only their labels count.

    Raises ValueError when there is no label, for unknown annotators, and when no pair is left.
    """
    if not 0.5 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must be between 0.5 and 1")
    labels = _labels_of(store, split, annotators)
    probabilities = posteriors(labels, method)
    by_item = defaultdict(list)
    for label in labels:
        by_item[label.item].append(label)
    rows, undecided, bad = [], 0, 0
    for item in store.items(split):
        if item.id not in probabilities:
            continue
        p, given = probabilities[item.id], by_item[item.id]
        if 2 * sum(label.choice == "bad" for label in given) > len(given):
            bad += 1
            continue
        # The posterior is not symmetric in its last digits, so one half is compared with a tolerance.
        if abs(p - 0.5) < 1e-9 or max(p, 1 - p) < min_p:
            undecided += 1
            continue
        chosen, rejected = (item.a, item.b) if p > 0.5 else (item.b, item.a)
        rows.append(
            {
                "prompt": item.prompt,
                "chosen": reply(item.prompt, chosen),
                "rejected": reply(item.prompt, rejected),
                "p_chosen": max(p, 1 - p),
                "n_labels": len(given),
                "annotators": sorted(label.annotator for label in given),
                "id": item.id,
            }
        )
    log(f"{len(rows)} pairs of {len(probabilities)} labelled ones; {undecided} undecided, {bad} bad on both sides")
    if not rows:
        raise ValueError(
            f"no pair is left to train on: of {len(probabilities)} labelled pairs {undecided} are undecided and {bad} bad "
            "on both sides. Label more pairs, or lower min_p"
        )
    return rows


def _labels_of(store: LabelStore, split: str, annotators: Iterable[str] | None):
    wanted = None if annotators is None else set(annotators)
    if wanted is not None and (unknown := wanted - store.annotators().keys()):
        raise ValueError(f"{store.path} has no annotator {', '.join(sorted(unknown))}: {', '.join(store.annotators())}")
    labels = store.labels(split)
    return [x for x in labels if x.choice != "skip" and (wanted is None or x.annotator in wanted)]


def export_rankings(
    store: LabelStore, *, method: str = "dawid_skene", split: str = "train", annotators: Iterable[str] | None = None
) -> list[dict]:
    """One row per prompt with a labelled pair: `prompt`, `completions` and `scores`, which dpo_fast.train reads.

    A completion's score is its mean probability of being the better one over its labelled pairs; completions without a
    labelled pair are left out. Raises ValueError as `export_pairs` does.
    """
    probabilities = posteriors(_labels_of(store, split, annotators), method)
    prompts, wins = {}, defaultdict(lambda: defaultdict(list))
    for item in store.items(split):
        if item.id in probabilities:
            prompts[item.prompt_id] = item.prompt
            wins[item.prompt_id][item.a].append(probabilities[item.id])
            wins[item.prompt_id][item.b].append(1 - probabilities[item.id])
    return [
        {
            "prompt": prompt,
            "completions": [reply(prompt, text) for text in wins[key]],
            "scores": [sum(shares) / len(shares) for shares in wins[key].values()],
        }
        for key, prompt in prompts.items()
    ]


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Write JSON lines; the file appears whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
