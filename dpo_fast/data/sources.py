"""Preference pairs from files and the hub, with every row that is left out counted and named.

A normalised row is `{"prompt", "chosen", "rejected"}`: three strings (plain text) or three message lists
(`[{"role": "user", "content": "..."}]`, for the chat template), and, where the data has them, `tools` (a list),
`chat_template_kwargs` (a dict) and `p_chosen` (a number). Files are read in readers.py, what a row may look like is in layouts.py,
rows are kept on disk by store.py and tokens are made in tokens.py. Nothing here knows a tokenizer or a model.
"""

import dataclasses
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from .layouts import RANKING_PAIRS, BadRowError, make_pair, read_row
from .readers import DataError, Source, dataset_key, open_source


@dataclasses.dataclass
class Pairs:
    """Normalised rows, the layout found in each source, (place, reason) of every row left out, and whether rows are text."""

    rows: Sequence[dict] = dataclasses.field(default_factory=list)
    layout: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    text: bool = False


def load_pairs(
    sources: "list[Source | str] | Source | str",
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    ranking_pairs: str = "all",
    seed: int = 0,
    log: Callable[[str], None] = print,
    cache: bool = False,
) -> Pairs:
    """Read and normalise every source, in order; pairs of one ranked prompt stay next to each other.

    cache: rows lie in a file below HF_DATASETS_CACHE, found again by the content of the sources, and are decoded when asked
    for (`store.Rows`); else they are a list.
    `split` holds for directories and hub names whose Source names none. `ranking_pairs` takes "all" strictly ordered pairs
    of ranked completions, or "best_worst". `seed` decides which pairs a fractional weight keeps.
    Raises FileNotFoundError for a missing path. Raises DataError for a row that cannot be used (with skip_bad_rows it is
    counted in `dropped` instead), for text mixed with messages, and when no pair is left.
    """
    sources = [sources] if isinstance(sources, str | Source) else sources
    pairs, kinds, found = Pairs(), {}, []
    for source in (Source(s) if isinstance(s, str) else s for s in sources):
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ValueError(f"{source.path}: weight must be a positive number, got {source.weight}")
        key, located = open_source(source, split)
        part, part_kinds = _normalise(located, source.path, ranking_pairs, skip_bad_rows, key if cache else None)
        label = ":".join(filter(None, (source.path, source.name, source.split)))
        rows = _weighted(part.rows, source.weight, random.Random(f"{seed}:{label}"))
        text = f"{label}: {len(part.rows)} pairs, layout: {part.layout[source.path]}"
        if source.weight != 1:
            text += f"; {len(rows)} with weight {source.weight:g}"
        if part.dropped:
            text += f"; {len(part.dropped)} left out (first: {': '.join(part.dropped[0])})"
        log(text)
        found.append(rows)
        pairs.dropped += part.dropped
        pairs.layout[label] = part.layout[source.path]
        kinds = part_kinds | kinds
    if found and all(not isinstance(rows, list) for rows in found):
        pairs.rows = found[0].join(found)
    else:
        pairs.rows = [row for rows in found for row in rows]
    _check_usable(pairs, kinds)
    return pairs


def normalise_rows(
    rows: Iterable[dict],
    where: str = "rows",
    *,
    ranking_pairs: str = "all",
    skip_bad_rows: bool = False,
    cache: bool = False,
) -> Pairs:
    """Normalise a list of dicts or a `datasets.Dataset`. `where` names the rows in messages (from row 0).

    cache: as in `load_pairs`, for a `datasets.Dataset`. Raises DataError as `load_pairs` does.
    """
    located = ((f"{where} row {i}", row) for i, row in enumerate(rows))
    key = dataset_key(rows, where) if cache else None
    pairs, kinds = _normalise(located, where, ranking_pairs, skip_bad_rows, key)
    _check_usable(pairs, kinds)
    return pairs


def split_pairs(pairs: Pairs, size: float, seed: int = 0) -> tuple[Pairs, Pairs]:
    """Hold out about `size` pairs (a share below 1, or a number), whole prompts at a time; returns (the rest, held out).

    No prompt is on both sides. Raises ValueError where one side would be empty.
    """
    groups, stored_rows = defaultdict(list), not isinstance(pairs.rows, list)
    keys = pairs.rows.prompt_keys() if stored_rows else (json.dumps(r["prompt"], sort_keys=True) for r in pairs.rows)
    for i, key in enumerate(keys):
        groups[key].append(i)
    prompts = list(groups.values())
    random.Random(seed).shuffle(prompts)
    wanted, held_out = size if size >= 1 else size * len(pairs.rows), set()
    while prompts and len(held_out) < wanted:
        held_out.update(prompts.pop())
    if not prompts or not held_out:
        raise ValueError(f"a split of size {size:g} leaves no pair on one side: there are {len(pairs.rows)} pairs")
    places = ([i for i in range(len(pairs.rows)) if (i in held_out) == side] for side in (False, True))
    sides = (pairs.rows.take(p) if stored_rows else [pairs.rows[i] for i in p] for p in places)
    rest, held = (dataclasses.replace(pairs, rows=rows) for rows in sides)
    return rest, dataclasses.replace(held, dropped=[])


def _check_usable(pairs: Pairs, kinds: dict[str, str]) -> None:
    """Raises DataError; sets `text`."""
    if not pairs.rows:
        why = f"; the first of {len(pairs.dropped)} left out is {': '.join(pairs.dropped[0])}" if pairs.dropped else ""
        raise DataError(f"no pair to train on in {', '.join(pairs.layout) or 'an empty list of sources'}{why}")
    if len(kinds) > 1:
        raise DataError(
            f"text and messages are mixed: {kinds['text']} is text, {kinds['messages']} is messages. Give all rows as "
            "messages (the chat template applies) or all as text (nothing is added but the EOS)"
        )
    pairs.text = "text" in kinds


def _weighted(rows: Sequence[dict], weight: float, rng: random.Random) -> Sequence[dict]:
    """All rows floor(weight) times and a random share, in order, for the rest; the rows themselves are not copied."""
    whole = math.floor(weight)
    share = sorted(rng.sample(range(len(rows)), round((weight - whole) * len(rows))))
    places = [*range(len(rows))] * whole + share
    return [rows[i] for i in places] if isinstance(rows, list) else rows.take(places)


# ---- Normalising: layouts.py reads a row; here rows are gathered and the bad ones are named. ----


def _normalise(located, where: str, ranking_pairs: str, skip_bad_rows: bool, key=None) -> tuple[Pairs, dict[str, str]]:
    """Pairs of one source, and the place of its first row of each kind ("text", "messages"); stored where `key` is given."""
    if ranking_pairs not in RANKING_PAIRS:
        raise ValueError(f"ranking_pairs={ranking_pairs!r} is not one of {', '.join(RANKING_PAIRS)}")
    pairs, layouts, kinds = Pairs(), Counter(), {}
    found = records(located, ranking_pairs, skip_bad_rows)
    if key is not None:
        from .store import stored

        kept = stored([key(), ranking_pairs, skip_bad_rows], lambda: found)
        pairs.rows, pairs.dropped, layouts, kinds = kept.rows, kept.dropped, Counter(kept.layouts), kept.kinds
        found = ()
    for record in found:
        if "reason" in record:
            pairs.dropped.append((record["place"], record["reason"]))
            continue
        pair = record["pair"]
        pairs.rows.append(pair)
        layouts[record["layout"]] += 1
        kinds.setdefault("text" if isinstance(pair["chosen"], str) else "messages", record["place"])
    counted = [name if len(layouts) == 1 else f"{name} ({n})" for name, n in layouts.most_common()]
    pairs.layout[where] = "; ".join(counted) or "none"
    return pairs, kinds


def records(located, ranking_pairs: str, skip_bad_rows: bool) -> Iterator[dict]:
    """`place` of each pair with its `layout` and `pair`, and of each row left out with its `reason`."""

    def bad(place: str, error: BadRowError) -> dict:
        if not skip_bad_rows:
            raise DataError(f"{place}: {error}. Mend the row, or leave such rows out with skip_bad_rows=True")
        return {"place": place, "reason": str(error)}

    for place, row in located:
        try:
            layout, extras, found = read_row(row, ranking_pairs)
        except BadRowError as error:
            yield bad(place, error)
            continue
        if not found:
            yield {"place": place, "reason": "no completion ranks above another"}
        for tag, *sides in found:
            try:
                how, pair = make_pair(*sides)
            except BadRowError as error:
                yield bad(place + tag, error)
                continue
            yield {"place": place, "layout": f"{layout} as {how}", "pair": pair | extras}
