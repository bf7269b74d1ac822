"""Preference pairs from files and the hub, with every row that is left out counted and named.

A normalised row is `{"prompt", "chosen", "rejected"}`: three strings (plain text) or three message lists
(`[{"role": "user", "content": "..."}]`, for the chat template), and, where the data has them, `tools` (a list),
`chat_template_kwargs` (a dict) and `p_chosen` (a number). layouts.py says what a row may look like; tokenization.py makes
the tokens. Nothing here knows a tokenizer or a model.
"""

import dataclasses
import gzip
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .layouts import RANKING_PAIRS, BadRowError, make_pair, read_row

SPLIT_NAME = re.compile(r"(^|[-_.])(train|test|validation|valid|val|dev|eval)([-_.\d]|$)")


class DataError(ValueError):
    """A row or file cannot be used; the message names the place and the field and says what to do."""


@dataclasses.dataclass
class Source:
    """A place that pairs come from: a .jsonl, .json or .parquet file (.gz too), a directory of them, or a hub name.

    `weight` repeats (2 = twice) or subsamples (0.5 = half) the source's pairs. `split` and `name` (the hub's
    configuration) choose among a directory's or hub data set's parts; for a file they are an error.
    """

    path: str
    weight: float = 1.0
    split: str | None = None
    name: str | None = None


@dataclasses.dataclass
class Pairs:
    """Normalised rows, the layout found in each source, and (place, reason) of every row that was left out."""

    rows: list[dict] = dataclasses.field(default_factory=list)
    layout: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def load_pairs(
    sources: "list[Source | str] | Source | str",
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    ranking_pairs: str = "all",
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> Pairs:
    """Read and normalise every source, in order; pairs of one ranked prompt stay next to each other.

    `split` holds for directories and hub names whose Source names none. `ranking_pairs` takes "all" strictly ordered pairs
    of ranked completions, or "best_worst". `seed` decides which pairs a fractional weight keeps.
    Raises FileNotFoundError for a missing path. Raises DataError for a row that cannot be used (with skip_bad_rows it is
    counted in `dropped` instead), for text mixed with messages, and when no pair is left.
    """
    sources = [sources] if isinstance(sources, str | Source) else sources
    pairs, kinds = Pairs(), {}
    for source in (Source(s) if isinstance(s, str) else s for s in sources):
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ValueError(f"{source.path}: weight must be a positive number, got {source.weight}")
        part, part_kinds = _normalise(read_source(source, split), source.path, ranking_pairs, skip_bad_rows)
        label = ":".join(filter(None, (source.path, source.name, source.split)))
        rows = _weighted(part.rows, source.weight, random.Random(f"{seed}:{label}"))
        text = f"{label}: {len(part.rows)} pairs, layout: {part.layout[source.path]}"
        if source.weight != 1:
            text += f"; {len(rows)} with weight {source.weight:g}"
        if part.dropped:
            text += f"; {len(part.dropped)} left out (first: {': '.join(part.dropped[0])})"
        log(text)
        pairs.rows += rows
        pairs.dropped += part.dropped
        pairs.layout[label] = part.layout[source.path]
        kinds = part_kinds | kinds
    _check_usable(pairs, kinds)
    return pairs


def normalise_rows(
    rows: Iterable[dict], where: str = "rows", *, ranking_pairs: str = "all", skip_bad_rows: bool = False
) -> Pairs:
    """Normalise rows in memory: a list of dicts or a `datasets.Dataset`. `where` names them in messages (from row 0).

    Raises DataError as `load_pairs` does.
    """
    located = ((f"{where} row {i}", row) for i, row in enumerate(rows))
    pairs, kinds = _normalise(located, where, ranking_pairs, skip_bad_rows)
    _check_usable(pairs, kinds)
    return pairs


def split_pairs(pairs: Pairs, size: float, seed: int = 0) -> tuple[Pairs, Pairs]:
    """Hold out about `size` pairs (a share below 1, or a number), whole prompts at a time; returns (the rest, held out).

    No prompt is on both sides. Raises ValueError where one side would be empty.
    """
    groups = defaultdict(list)
    for i, row in enumerate(pairs.rows):
        groups[json.dumps(row["prompt"], sort_keys=True)].append(i)
    prompts = list(groups.values())
    random.Random(seed).shuffle(prompts)
    wanted, held_out = size if size >= 1 else size * len(pairs.rows), set()
    while prompts and len(held_out) < wanted:
        held_out.update(prompts.pop())
    if not prompts or not held_out:
        raise ValueError(f"a split of size {size:g} leaves no pair on one side: there are {len(pairs.rows)} pairs")
    sides = ([row for i, row in enumerate(pairs.rows) if (i in held_out) == side] for side in (False, True))
    rest, held = (dataclasses.replace(pairs, rows=rows) for rows in sides)
    return rest, dataclasses.replace(held, dropped=[])


def _check_usable(pairs: Pairs, kinds: dict[str, str]) -> None:
    if not pairs.rows:
        why = f"; the first of {len(pairs.dropped)} left out is {': '.join(pairs.dropped[0])}" if pairs.dropped else ""
        raise DataError(f"no pair to train on in {', '.join(pairs.layout) or 'an empty list of sources'}{why}")
    if len(kinds) > 1:
        raise DataError(
            f"text and messages are mixed: {kinds['text']} is text, {kinds['messages']} is messages. Give all rows as "
            "messages (the chat template applies) or all as text (nothing is added but the EOS)"
        )


def _weighted(rows: list[dict], weight: float, rng: random.Random) -> list[dict]:
    """floor(weight) copies of all rows, and for the rest of the weight a random share of them in order."""
    whole = math.floor(weight)
    share = sorted(rng.sample(range(len(rows)), round((weight - whole) * len(rows))))
    return rows * whole + [rows[i] for i in share]


# ---- Reading: every reader yields (place, row), or (place, BadRowError) for a line that is not a row. ----


def locate(source: Source, split: str = "train") -> list[Path] | None:
    """The files of a source, found without reading them, or None for a hub name.

    Raises FileNotFoundError for a missing path, ValueError (DataError) for a file of an unknown kind, a directory without
    the split, and a split or name that has no effect.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        if source.name:
            raise ValueError(f"{source.path}: name={source.name!r} is for hub data sets, this is a directory")
        return _files_of_split(path, source.split or split)
    if path.is_file():
        if source.split or source.name:
            raise ValueError(f"{source.path} is one file: split and name have no effect, leave them out")
        if _reader(path) is None:
            raise DataError(f"{path}: unknown kind of file, known are {', '.join(READERS)} (and .gz of the JSON ones)")
        return [path]
    if _reader(path) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source.path):
        raise FileNotFoundError(f"no such file or directory: {source.path} (absolute: {path.absolute()})")
    return None


def read_source(source: Source, split: str) -> Iterator[tuple[str, object]]:
    """(place, row) of every row, or (place, BadRowError) for a line that is not a row."""
    files = locate(source, split)
    if files is None:
        yield from _read_hub(source, split)
    for file in files or ():
        yield from _reader(file)(file)


def _files_of_split(directory: Path, split: str) -> list[Path]:
    """The files `train.jsonl`, `train-00000-of-00002.parquet`, ..., or every data file when no name holds a split's."""

    def stem(file: Path) -> str:
        return file.name.removesuffix(".gz").rpartition(".")[0]

    candidates = sorted(directory.iterdir()) + sorted(directory.glob("data/*"))
    files = [f for f in candidates if f.is_file() and _reader(f) and not f.name.startswith((".", "dataset_info"))]
    matching = [f for f in files if re.fullmatch(re.escape(split) + r"([-_.]\d.*)?", stem(f))]
    if matching or (files and not any(SPLIT_NAME.search(stem(f)) for f in files)):
        return matching or files
    found = ", ".join(f.name for f in files) or f"no file ending in {', '.join(READERS)}"
    raise DataError(f"{directory} has no file of the split {split!r}, found: {found}. Name a file or another split")


def _reader(path: Path) -> Callable[[Path], Iterator] | None:
    name = path.name.lower().removesuffix(".gz")
    return next((read for ending, read in READERS.items() if name.endswith(ending)), None)


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _read_lines(path: Path) -> Iterator[tuple[str, object]]:
    # The file is read as bytes, so that only \n ends a line: str.splitlines also cuts at characters that JSON may hold.
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path} line {number}", json.loads(line)
                except ValueError as error:
                    yield f"{path} line {number}", BadRowError(f"the line is not valid JSON: {error}")


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    """A list of rows, or an object that holds one under "data"; JSON lines under the name .json are read too."""
    with _open(path) as file:
        text = file.read()
    try:
        value = json.loads(text)
    except ValueError as error:
        first = next((line for line in text.splitlines() if line.strip()), b"")
        if first.lstrip().startswith(b"{") and first.rstrip().endswith(b"}"):
            yield from _read_lines(path)
            return
        raise DataError(f"{path} is not valid JSON: {error}") from None
    rows = value.get("data", [value]) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f'{path} must hold a list of rows or {{"data": [...]}}, found {type(rows).__name__}')
    for i, row in enumerate(rows):
        yield f"{path} row {i}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=4096)
    except ValueError as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None
    rows = (row for batch in batches for row in batch.to_pylist())
    for i, row in enumerate(rows):
        yield f"{path} row {i}", row


def _read_hub(source: Source, split: str) -> Iterator[tuple[str, object]]:
    import datasets

    split = source.split or split
    try:
        rows = datasets.load_dataset(source.path, source.name, split=split)
    except Exception as error:  # hub, network and builder errors share no base class
        raise DataError(
            f"{source.path} is neither a local path ({Path(source.path).absolute()}) nor could it be loaded from the "
            f"hub (split {split!r}, name {source.name!r}): {error}"
        ) from error
    for i, row in enumerate(rows):
        yield f"{source.path} {split} row {i}", row


READERS = {".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_json, ".parquet": _read_parquet}


# ---- Normalising: layouts.py reads a row; here rows are gathered and the bad ones are named. ----


def _normalise(located, where: str, ranking_pairs: str, skip_bad_rows: bool) -> tuple[Pairs, dict[str, str]]:
    """The pairs of one source, and the place of its first row of each kind ("text", "messages")."""
    if ranking_pairs not in RANKING_PAIRS:
        raise ValueError(f"ranking_pairs={ranking_pairs!r} is not one of {', '.join(RANKING_PAIRS)}")
    pairs, layouts, kinds = Pairs(), Counter(), {}

    def bad(place: str, error: BadRowError) -> None:
        if not skip_bad_rows:
            raise DataError(f"{place}: {error}. Mend the row, or leave such rows out with skip_bad_rows=True")
        pairs.dropped.append((place, str(error)))

    for place, row in located:
        try:
            layout, extras, found = read_row(row, ranking_pairs)
        except BadRowError as error:
            bad(place, error)
            continue
        if not found:
            pairs.dropped.append((place, "no completion ranks above another"))
        for tag, *sides in found:
            try:
                how, pair = make_pair(*sides)
            except BadRowError as error:
                bad(place + tag, error)
                continue
            pairs.rows.append(pair | extras)
            layouts[f"{layout} as {how}"] += 1
            kinds.setdefault("text" if isinstance(pair["chosen"], str) else "messages", place)
    counted = [name if len(layouts) == 1 else f"{name} ({n})" for name, n in layouts.most_common()]
    pairs.layout[where] = "; ".join(counted) or "none"
    return pairs, kinds
