"""Normalised pairs in an Arrow file that is mapped, not read: made once per content of the sources, then found again.

A record is a row of a source that was used or left out: `place`, and either `pair` (JSON), `layout`, `text` (else
messages) and `prompt` (16 bytes, equal for equal prompts), or `reason`. Where the files lie is in cache.py.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .cache import cache_folder, locked, sweep

_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("place", "pair", "layout", "reason")),
        ("text", pa.bool_()),
        ("prompt", pa.binary()),
    ]
)
_RECORDS = 1024  # per record batch, and so in memory


class Rows(Sequence):
    """Normalised rows, decoded when they are asked for. Equal to a list of the same rows.

    parts: datasets of records, one per source. index: int64 places in the parts one after the other, repeated or left out.
    """

    def __init__(self, parts: list, index: np.ndarray):
        self.parts, self.index = parts, index
        self.table = pa.concat_tables([part.data.table for part in parts])

    @classmethod
    def of(cls, rows: Sequence[dict], where: str = "row") -> "Rows":
        """Of rows in memory."""
        import datasets

        records = ({"place": f"{where} {i}", "pair": row} for i, row in enumerate(rows))
        table = pa.Table.from_batches(list(_batches(records)), _SCHEMA)
        return cls([datasets.Dataset(table, fingerprint="in memory")], np.arange(len(table)))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        return json.loads(self.table["pair"][int(self.index[i])].as_py())

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def take(self, places) -> "Rows":
        """The rows at `places`, in that order."""
        return Rows(self.parts, self.index[np.asarray(places, dtype=np.int64)])

    def places(self) -> list[str]:
        """Where each row comes from."""
        return self.table["place"].take(pa.array(self.index)).to_pylist()

    def prompt_keys(self) -> list[bytes]:
        """Equal for equal prompts."""
        return self.table["prompt"].take(pa.array(self.index)).to_pylist()

    @staticmethod
    def join(many: "list[Rows]") -> "Rows":
        """All of them, one after the other."""
        starts = np.cumsum([0, *(len(rows.table) for rows in many)])
        index = [rows.index + start for rows, start in zip(many, starts[:-1], strict=True)]
        return Rows([part for rows in many for part in rows.parts], np.concatenate(index))


class Stored:
    """The records of one source: `rows`, how many have each layout, (place, reason) of what was left out, and places of kinds."""

    def __init__(self, part):
        table = part.data.table
        usable = pc.is_valid(table["pair"])
        self.rows = Rows([part], np.flatnonzero(usable.to_numpy()))
        self.layouts = {x["values"]: x["counts"] for x in table["layout"].drop_null().value_counts().to_pylist()}
        dropped = table.select(["place", "reason"]).filter(pc.invert(usable))
        self.dropped = list(zip(dropped["place"].to_pylist(), dropped["reason"].to_pylist(), strict=True))
        self.kinds = {}
        for kind, value in (("text", True), ("messages", False)):
            first = pc.index(table["text"], pa.scalar(value)).as_py()
            if first >= 0:
                self.kinds[kind] = table["place"][first].as_py()


def stored(key, records: Callable[[], Iterable[dict]]) -> Stored:
    """The records of a source whose content `key` (JSON-able) names, made by `records` where they are not there yet.

    Of several processes one makes the file, the others wait for it and map it.
    """
    import datasets

    name = digest_of([code_digest(), key])
    path = cache_folder() / name / "records.arrow"
    sweep()
    with locked(path.parent / "lock"):
        if not path.exists():
            temporary = path.with_suffix(".part")
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
                for batch in _batches(records()):
                    writer.write_batch(batch)
            temporary.replace(path)
        part = datasets.Dataset.from_file(str(path))
    part._fingerprint = name
    return Stored(part)


def _batches(records: Iterable[dict]) -> Iterator[pa.RecordBatch]:
    batch = []
    for record in records:
        if (pair := record.get("pair")) is not None:
            prompt = hashlib.blake2b(json.dumps(pair["prompt"], sort_keys=True).encode(), digest_size=16).digest()
            record |= {"pair": json.dumps(pair, default=str), "prompt": prompt, "text": isinstance(pair["chosen"], str)}
        batch.append(record)
        if len(batch) == _RECORDS:
            yield pa.RecordBatch.from_pylist(batch, _SCHEMA)
            batch = []
    if batch:
        yield pa.RecordBatch.from_pylist(batch, _SCHEMA)


# What files are named by.


def digest_of(value) -> str:
    """32 hex digits of a JSON-able value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def content_digest(path: Path) -> str:
    """32 hex digits of a file's bytes; they are read again only where its size or times have changed."""
    stat = path.stat()
    known = (
        cache_folder() / "files" / digest_of([str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    )
    with locked(known.with_suffix(".lock")):
        if not known.exists():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            known.with_suffix(".part").write_text(found)
            known.with_suffix(".part").replace(known)
        return known.read_text()


@functools.cache
def code_digest() -> str:
    """Changes with the code that reads rows and makes tokens of them."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
