"""A candidates file becomes pairs that can be labelled, in rounds over the prompts.

An item is two completions of one prompt, `a` and `b`. Each showing decides anew which of them is on the left, so the names
carry no order. Empty completions make no pair, since nothing can be trained on them.
"""

import dataclasses
import hashlib
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..data.sources import load_pairs

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Item:
    """Two completions of a prompt. `gold` is the known answer ("a" or "b") of a question that tests annotators, else None."""

    id: str
    prompt_id: str
    prompt: str | list[dict]
    a: str
    b: str
    split: str = "train"
    gold: str | None = None
    truncated: str = ""  # which completions were cut at max_new_tokens: "", "a", "b" or "ab"


def read_candidates(path: str | Path) -> list[dict]:
    """The lines of a candidates file, checked: each has `id`, `prompt`, `split` and `completions` with their `text`.

    Raises ValueError, naming the line, for a line that was cut or holds something else, and for a prompt that comes twice.
    """
    rows, seen = [], {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = _checked(json.loads(line))
            except ValueError as error:
                cut = "" if line.endswith(b"\n") else ", and it is cut: run generate again, which goes on where it was"
                raise ValueError(f"{where} is not a line of candidates{cut} ({error})") from None
            if row["id"] in seen:
                raise ValueError(f"{where} has the prompt of line {seen[row['id']]} again: merge the two lines")
            seen[row["id"]] = number
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no candidates: run generate first")
    return rows


def _checked(row) -> dict:
    if not isinstance(row, dict):
        raise ValueError("a line must be an object")
    prompt, completions = row.get("prompt"), row.get("completions")
    messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )
    if not isinstance(prompt, str) and not (messages and prompt):
        raise ValueError("'prompt' must be text or messages with role and content")
    texts = [c.get("text") if isinstance(c, dict) else None for c in completions or ()]
    if not isinstance(completions, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("'completions' must be a list of objects with a 'text'")
    row = {"split": "train", "id": prompt_id(prompt)} | row
    if row["split"] not in SPLITS:
        raise ValueError(f"'split' must be train or heldout, found {row['split']!r}")
    row["id"] = str(row["id"])
    return row


def prompt_id(prompt: str | list[dict]) -> str:
    """16 hex digits that name a prompt, the same in every run."""
    return hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).hexdigest()


def fingerprint(rows: Iterable[dict]) -> str:
    """32 hex digits that change whenever a prompt, a completion or a split does; the order of the lines does not matter."""
    content = sorted(
        json.dumps([r["id"], r["prompt"], r["split"], [c["text"] for c in r["completions"]]], sort_keys=True)
        for r in rows
    )
    return hashlib.blake2b("\n".join(content).encode(), digest_size=16).hexdigest()


def make_items(rows: Iterable[dict]) -> list[Item]:
    """All pairs of unequal, non-empty completions. Raises ValueError where there is none."""
    items = []
    for row in rows:
        texts = [(i, c) for i, c in enumerate(row["completions"]) if c["text"].strip()]
        for (i, a), (j, b) in itertools.combinations(texts, 2):
            if a["text"] != b["text"]:
                cut = "".join(name for name, c in (("a", a), ("b", b)) if c.get("truncated"))
                key = f"{row['id']}:{i}-{j}"
                items.append(Item(key, row["id"], row["prompt"], a["text"], b["text"], row["split"], None, cut))
    if not items:
        raise ValueError("no prompt has two completions that differ and are not empty: generate more per prompt")
    return items


def read_gold(path: str) -> list[Item]:
    """Questions with a known answer, from pairs in any layout that `dpo_fast.train` reads; `a` is the better one."""
    items = []
    for row in load_pairs(path, log=lambda _: None).rows:
        a, b = (completion_text(row[side]) for side in ("chosen", "rejected"))
        key = prompt_id([row["prompt"], a, b])
        items.append(Item(f"gold:{key}", f"gold:{prompt_id(row['prompt'])}", row["prompt"], a, b, "train", "a"))
    return items


def completion_text(completion: str | list[dict]) -> str:
    """A completion as text; the contents of several messages follow each other."""
    return completion if isinstance(completion, str) else "\n\n".join(m.get("content") or "" for m in completion)


def in_rounds(items: Sequence[Item], priority: Callable[[Item], float] = lambda item: 0.0, seed: int = 0) -> list[Item]:
    """One pair of each prompt, then a second one of each, and so on; lower `priority` comes first, and chance breaks ties."""
    shuffled = sorted(items, key=lambda item: item.id)
    random.Random(seed).shuffle(shuffled)
    shuffled.sort(key=priority)
    taken, keyed = defaultdict(int), []
    for i, item in enumerate(shuffled):
        keyed.append((taken[item.prompt_id], i, item))
        taken[item.prompt_id] += 1
    return [item for *_, item in sorted(keyed, key=lambda entry: entry[:2])]
