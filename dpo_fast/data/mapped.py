"""Tokens of rows through `datasets`' map: in several processes, kept in a file, found again by what they depend on."""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .cache import cache_folder, locked, sweep
from .examples import FIELDS, SCHEMA, Examples, to_table
from .store import Rows, code_digest, digest_of
from .tokens import ROWS_A_CALL, TokenizedPairs, Tokens, check_tokenizer, tokens_of, truncated_row

_COUNTS = ("truncated", "identical", "double_bos")
# What became of a row stands beside its ids: `reason` where it is left out (its ids are empty then).
_COLUMNS = pa.schema(
    [*SCHEMA, ("reason", pa.string()), ("tail", pa.string()), *((name, pa.bool_()) for name in _COUNTS)]
)
_NOTHING = {name: [] for name in FIELDS}


def map_rows(rows: Sequence[dict], tokenizer, options: dict, num_proc: int | None, progress: bool) -> TokenizedPairs:
    """`tokenize_pairs` of rows on disk, or of rows in memory in several processes. `options`: those of `tokens_of`."""
    if not isinstance(rows, Rows):
        rows = Rows.of(rows)
    kinds = pc.unique(rows.table["text"].take(pa.array(rows.index))).to_pylist() if len(rows) else []
    check_tokenizer(tokenizer, True in kinds, False in kinds)
    function = _Tokenise(tokenizer, options)
    made = _mapped(rows.parts, function, [tokenizer_digest(tokenizer), options], num_proc, progress, "tokenise")
    return _gathered(made, rows.index)


def map_ids(rows, options: dict, num_proc: int | None, progress: bool) -> TokenizedPairs:
    """The examples of a `datasets.Dataset` that holds ids, truncated. Raises ValueError for an empty completion."""
    made = _mapped([rows], _Truncate(**options), options, num_proc, progress, "truncate")
    return _gathered(made, np.arange(len(rows)))


@dataclasses.dataclass
class _Tokenise:
    tokenizer: object
    options: dict

    def __call__(self, batch: pa.Table) -> pa.Table:
        found = [Tokens()] * len(batch)
        used = [i for i, pair in enumerate(batch["pair"]) if pair.is_valid]
        rows, places = ([batch[name][i].as_py() for i in used] for name in ("pair", "place"))
        tokens = tokens_of([json.loads(row) for row in rows], places, self.tokenizer, **self.options)
        for i, of_row in zip(used, tokens, strict=True):
            found[i] = of_row
        return _table(found)


@dataclasses.dataclass
class _Truncate:
    name: str
    max_length: int | None
    truncation_mode: str

    def __call__(self, batch: pa.Table, indices: list[int]) -> pa.Table:
        found = []
        for i, row in zip(indices, batch.to_pylist(), strict=True):
            found.append(truncated_row(row, f"{self.name} row {i}", self.max_length, self.truncation_mode))
        return _table(found)


def _table(found: list[Tokens]) -> pa.Table:
    table = to_table([_NOTHING if tokens.example is None else tokens.example for tokens in found])
    for field in list(_COLUMNS)[len(SCHEMA) :]:
        values = [getattr(tokens, field.name) for tokens in found]
        if field.name == "reason":  # a row that was left out before has no other reason
            values = ["" if t.example is None and t.reason is None else t.reason for t in found]
        table = table.append_column(field, pa.array(values, field.type))
    return table


def _mapped(parts: list, function: Callable, content, num_proc: int | None, progress: bool, what: str):
    """The parts' rows through `function`, one `datasets.Dataset`. `content`: what the result depends on beside the rows."""
    import datasets

    made = []
    sweep()
    for part in parts:
        name = digest_of([part._fingerprint, content, what, code_digest()])
        # Rows in memory stay there; for others the folder of the user's data is not written into.
        file = cache_folder() / name / "tokens.arrow" if part.cache_files else None
        with contextlib.nullcontext() if file is None else locked(file.parent / "lock"), _bars(progress):
            made.append(
                part.with_format("arrow").map(
                    function,
                    with_indices=what == "truncate",
                    batched=True,
                    batch_size=ROWS_A_CALL,
                    remove_columns=part.column_names,
                    features=datasets.Features.from_arrow_schema(_COLUMNS),
                    num_proc=num_proc if num_proc and num_proc > 1 else None,
                    cache_file_name=None if file is None else str(file),
                    new_fingerprint=name,
                    desc=what,
                )
            )
    return datasets.concatenate_datasets(made)


@contextlib.contextmanager
def _bars(shown: bool):
    """`datasets`' progress bars, where they are wanted, were not switched off, and somebody may be looking."""
    import datasets

    hide = not (shown and sys.stderr.isatty()) and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _gathered(made, index: np.ndarray) -> TokenizedPairs:
    """What became of the rows `index` of the mapped table."""
    table = made.data.table
    usable = table["reason"].is_null().to_numpy()[index]
    left_out = np.flatnonzero(~usable)
    reasons = table["reason"].take(pa.array(index[left_out])).to_pylist()
    clipped = np.flatnonzero(table["tail"].is_valid().to_numpy()[index])
    first = None
    if len(clipped):
        first = int(clipped[0]), table["tail"][int(index[clipped[0]])].as_py()
    counts = {name: int(table[name].to_numpy()[index].sum()) for name in _COUNTS}
    return TokenizedPairs(
        examples=Examples(made, index[usable]),
        dropped=list(zip(left_out.tolist(), reasons, strict=True)),
        clipped=len(clipped),
        first_clipped=first,
        **counts,
    )


def tokenizer_digest(tokenizer) -> str:
    """Changes with the ids that a tokenizer gives, and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from datasets.fingerprint import Hasher

        return Hasher.hash(tokenizer)
    # A call with neither, as ours are, sets both back; until then the file's own settings would be hashed.
    backend.no_truncation()
    backend.no_padding()
    content = hashlib.blake2b(backend.to_str().encode(), digest_size=16).hexdigest()
    names = ("eos_token", "bos_token_id", "chat_template", "split_special_tokens", "special_tokens_map")
    return digest_of([type(tokenizer).__qualname__, content, *(getattr(tokenizer, name, None) for name in names)])
