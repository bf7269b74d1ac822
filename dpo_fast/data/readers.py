"""Rows of files, folders and the hub: every reader yields (place, row), or (place, BadRowError) for a line that is not a row."""

import dataclasses
import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .layouts import BadRowError

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


def read_source(source: Source, split: str, streaming: bool = False) -> Iterator[tuple[str, object]]:
    """(place, row) of every row, or (place, BadRowError) for a line that is not a row. streaming: see `open_source`."""
    return open_source(source, split, streaming)[1]


def open_source(source: Source, split: str, streaming: bool = False) -> tuple[object, Iterator[tuple[str, object]]]:
    """What names the content of a source (called: a JSON-able value), and the rows as `read_source` gives them.

    streaming: rows of the hub are fetched as they are asked for, nothing is stored, and the content has no name.
    """
    files = locate(source, split)
    if files is None:
        return _open_hub(source, split, streaming)
    located = (row for file in files for row in _reader(file)(file))
    return lambda: _digests(files), located


def _digests(files: list[Path]) -> list:
    from .store import content_digest

    return [[str(file), content_digest(file)] for file in files]


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


def _open_hub(source: Source, split: str, streaming: bool) -> tuple[object, Iterator[tuple[str, object]]]:
    import datasets

    split = source.split or split
    try:
        rows = datasets.load_dataset(source.path, source.name, split=split, streaming=streaming)
    except Exception as error:  # hub, network and builder errors share no base class
        raise DataError(
            f"{source.path} is neither a local path ({Path(source.path).absolute()}) nor could it be loaded from the "
            f"hub (split {split!r}, name {source.name!r}): {error}"
        ) from error
    where = f"{source.path} {split}"
    return dataset_key(rows, where), ((f"{where} row {i}", row) for i, row in enumerate(rows))


def dataset_key(rows, where: str):
    """What names the content of a `datasets.Dataset`, as in `open_source`; None for other rows."""
    fingerprint = getattr(rows, "_fingerprint", None)
    return None if fingerprint is None else lambda: [where, fingerprint]


READERS = {".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_json, ".parquet": _read_parquet}
