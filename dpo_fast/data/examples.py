"""`Examples`: tokenised pairs as a view of Arrow columns, 4 bytes per token, mapped from the disk where they lie in a file.

A row of the table is a pair: its ids as int32, and what is known of them without reading them (`SCHEMA`). An example is
made when it is asked for: a mapping of arrays that are slices of the columns, nothing copied.
"""

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from ..forest.trie import common_prefix_length

FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_LISTS = (*FIELDS, "rejected_prompt_ids")
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
SCHEMA = pa.schema(
    [
        *((name, pa.list_(pa.int32())) for name in FIELDS),
        ("rejected_prompt_ids", pa.list_(pa.int32())),  # null where the rejected completion follows the same prompt
        ("p_chosen", pa.float64()),  # null where the row has none
        ("odd_p_chosen", pa.string()),  # what stands in its place where that is no number
        ("key", pa.binary()),  # `example_key`
        ("prompt", pa.int64()),  # equal for equal `prompt_ids`
        ("smallest", pa.int64()),  # of the ids, or 0
        ("largest", pa.int64()),
        ("shared", pa.int32()),  # ids that the two completions begin with in common
    ]
)


def example_key(example: Mapping) -> bytes:
    """16 bytes that name the id sequences; each is hashed after its length, so that no two examples look alike.

    Raises ValueError for a field that is not a flat sequence of ints.
    """
    digest = hashlib.blake2b(digest_size=16)
    for field in _LISTS if "rejected_prompt_ids" in example else FIELDS:
        ids = np.asarray(example[field])
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"{field} must be a flat sequence of ints, not {ids.dtype} of shape {ids.shape}")
        digest.update(struct.pack("<q", ids.size) + ids.astype("<i8").tobytes())
    return digest.digest()


def to_table(examples: Sequence[Mapping]) -> pa.Table:
    """The columns of examples that hold sequences of int. Ids that int32 cannot hold are cut to its range."""
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    for example in examples:
        columns["key"].append(example_key(example))
        ids = {name: np.asarray(example[name], dtype=np.int64) for name in _LISTS if name in example}
        for name in _LISTS:
            columns[name].append(ids.get(name))
        prompt = hashlib.blake2b(ids["prompt_ids"].tobytes(), digest_size=8).digest()
        columns["prompt"].append(int.from_bytes(prompt, "little", signed=True))
        columns["smallest"].append(min(int(x.min(initial=0)) for x in ids.values()))
        columns["largest"].append(max(int(x.max(initial=0)) for x in ids.values()))
        columns["shared"].append(common_prefix_length(ids["chosen_ids"], ids["rejected_ids"]))
        value = example.get("p_chosen")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        columns["p_chosen"].append(float(value) if number else None)
        columns["odd_p_chosen"].append(None if number or value is None else repr(value))
    arrays = [_int_lists(columns[f.name]) if f.name in _LISTS else pa.array(columns[f.name], f.type) for f in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _int_lists(rows: list[np.ndarray | None]) -> pa.ListArray:
    offsets = np.cumsum([0, *(0 if x is None else len(x) for x in rows)])
    limits = np.iinfo(np.int32)
    parts = [np.clip(x, limits.min, limits.max).astype(np.int32) for x in rows if x is not None]
    values = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    absent = np.array([*(x is None for x in rows), False])
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32), mask=absent), pa.array(values))


class _IntLists:
    """A chunked column of int32 lists as arrays; `None` where a row is null."""

    def __init__(self, column: pa.ChunkedArray):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.starts = np.cumsum([0, *map(len, chunks)]).tolist()
        self.chunks = [(chunk.values.to_numpy(), chunk.offsets.to_numpy()) for chunk in chunks]
        self.null = np.concatenate([c.is_null().to_numpy(False) for c in chunks]) if column.null_count else None

    def __getitem__(self, row: int) -> np.ndarray | None:
        if self.null is not None and self.null[row]:
            return None
        k = bisect_right(self.starts, row) - 1
        values, offsets = self.chunks[k]
        at = row - self.starts[k]
        return values[offsets[at] : offsets[at + 1]]

    def lengths(self) -> np.ndarray:
        parts = [np.diff(offsets) for _, offsets in self.chunks]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


class Examples(Sequence):
    """Mappings with `prompt_ids`, `chosen_ids`, `rejected_ids` (int32 arrays, not to be written to) and `index`, their place.

    Some also have `rejected_prompt_ids` or `p_chosen`; all or none have `ref_chosen_logps` and `ref_rejected_logps`.
    `examples[a:b]` is a view of the same columns.

    source: a table of `SCHEMA`, or a `datasets.Dataset` of one (pickled by its files' names).
    index: int64 rows of the source, in order, repeated or left out; None: all of them.
    reference: float64 [len, 2], the reference's log-probs (chosen, rejected).
    """

    def __init__(self, source, index: np.ndarray | None = None, reference: np.ndarray | None = None, noise=True):
        self.source, self.index, self.reference, self.noise = source, index, reference, noise
        self.table: pa.Table = source if isinstance(source, pa.Table) else source.data.table
        self._lists = {name: _IntLists(self.table[name]) for name in _LISTS}
        self._p_chosen = self.table["p_chosen"].to_numpy()

    @classmethod
    def of(cls, examples: Sequence[Mapping]) -> "Examples":
        """Of mappings in memory; all that is not of the columns above is left out."""
        if isinstance(examples, Examples):
            return examples
        reference = None
        if len(examples) and all(name in examples[0] for name in _REFERENCE):
            reference = np.array([[e[name] for name in _REFERENCE] for e in examples], dtype=np.float64)
        return cls(to_table(examples), reference=reference)

    def __getstate__(self):
        return self.source, self.index, self.reference, self.noise

    def __setstate__(self, state):
        self.__init__(*state)

    def __len__(self) -> int:
        return len(self.table) if self.index is None else len(self.index)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        i = range(len(self))[i]
        row = i if self.index is None else int(self.index[i])
        example = {name: self._lists[name][row] for name in FIELDS}
        other = self._lists["rejected_prompt_ids"][row]
        if other is not None:
            example["rejected_prompt_ids"] = other
        if self.noise and not np.isnan(self._p_chosen[row]):
            example["p_chosen"] = float(self._p_chosen[row])
        if self.reference is not None:
            example.update(zip(_REFERENCE, self.reference[i].tolist(), strict=True))
        return example | {"index": i}

    def take(self, places: np.ndarray) -> "Examples":
        """Those at `places`, in that order."""
        reference = None if self.reference is None else self.reference[places]
        return self.replace(index=places if self.index is None else self.index[places], reference=reference)

    def replace(self, **changes) -> "Examples":
        """A view with another `index`, `reference` or `noise` (False: without `p_chosen`)."""
        view = object.__new__(Examples)
        view.__dict__ = self.__dict__ | changes
        return view

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, one per example; null is NaN."""
        return self._mine(self.table[name].to_numpy())

    def missing(self, name: str) -> np.ndarray:
        """Whether each has no value in the column."""
        return self._mine(self.table[name].is_null().to_numpy())

    def _mine(self, values: np.ndarray) -> np.ndarray:
        return values if self.index is None else values[self.index]

    def lengths(self, name: str) -> np.ndarray:
        """Ids of each example's list `name`, int64; 0 where it has none."""
        return self._mine(self._lists[name].lengths())

    def keys(self) -> np.ndarray:
        """`example_key` of each, as void of 16 bytes."""
        parts = [np.zeros(0, "V16")]
        for chunk in self.table["key"].chunks:
            _, offsets, data = chunk.buffers()
            first = np.frombuffer(offsets, np.int32)[chunk.offset] if len(chunk) else 0
            parts.append(np.frombuffer(data or b"", "V16", len(chunk), first))
        return self._mine(np.concatenate(parts))

    def odd_p_chosen(self) -> dict[int, str]:
        """Place -> what stands there, of each `p_chosen` that is no number."""
        odd = self.table["odd_p_chosen"]
        if odd.null_count == len(odd):
            return {}
        rows = range(len(self)) if self.index is None else self.index.tolist()
        return {i: odd[row].as_py() for i, row in enumerate(rows) if odd[row].is_valid}

    def sequence_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of prompt and completion, for the chosen and the rejected completions."""
        prompt, other = self.lengths("prompt_ids"), self.lengths("rejected_prompt_ids")
        other = np.where(self.missing("rejected_prompt_ids"), prompt, other)
        return prompt + self.lengths("chosen_ids"), other + self.lengths("rejected_ids")

    def pair_tokens(self, share: str) -> np.ndarray:
        """`packing.pair_tokens` of each."""
        total = sum(self.sequence_lengths())
        if share == "none":
            return total
        shared = self.lengths("prompt_ids") + (self.column("shared") if share == "prefix" else 0)
        return total - np.where(self.missing("rejected_prompt_ids"), shared, 0)
