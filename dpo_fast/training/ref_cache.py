"""Reference log-probs on disk, found again by content: a run, a resumed run and the next run compute them once.

A value is addressed by what it depends on: the token ids of the pair, the weights and config of the reference, the
precision, the version of the code, and whatever else the caller names. Nothing is addressed by position, so values can
be neither stale nor misordered (open-instruct#1182, trl#2423). A model that reads more than token ids (images) needs
those in `extra`; they are not part of an example's address.

There is one file per combination, `ref-<hash>.bin`, of 36-byte little-endian records, which is only ever appended to.
`ref-<hash>.json` beside it says in words what the file is for and is never read back:

    blake2b of the token ids, 16 bytes | log p(chosen), log p(rejected) in nats, 2 x float64 | crc32 of these, uint32

A writer that is killed leaves an incomplete or wrong last record; both count as missing. `flock` orders concurrent
writers, so the folder must be on a file system that has it (local disks, NFSv4, Lustre mounted with `flock`).
"""

import fcntl
import hashlib
import inspect
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..data.examples import FIELDS, Examples, example_key
from .disk import full_disk, is_full

logger = logging.getLogger(__name__)
_RECORD = np.dtype([("key", "V16"), ("values", "<f8", 2), ("crc", "<u4")])
_BODY = _RECORD.itemsize - 4
# Config entries, at any depth, that differ between runs of one model and do not change its log-probs. Each tensor's own
# dtype is hashed, and the caller's `precision` names the dtype of the computation.
_VOLATILE = {
    *("transformers_version", "_name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "use_cache"),
    *("_attn_implementation", "_experts_implementation", "output_attentions", "output_hidden_states", "return_dict"),
}


def weights_fingerprint(model: torch.nn.Module, *, skip: Callable[[str], bool] | None = None) -> str:
    """32 hex digits that change whenever a parameter, a persistent buffer or the config of `model` does.

    Hashes name, dtype, shape and bytes of every entry of `model.state_dict()` in the order of the names (a tied weight
    once), then `model.config.to_dict()` without entries such as `use_cache`. Tensors are hashed by up to 8 threads,
    each of which holds at most one of them on the CPU.

    `skip(name)` leaves an entry out. For a PEFT model that serves as its own reference with the adapter disabled:
    `skip=lambda name: "lora_" in name`. PEFT renames weights, so the bare model has another fingerprint.

    Raises ValueError for a state entry that is not a tensor, and what torch raises for a tensor without data (meta).
    """
    first_name: dict[int, str] = {}  # id of a tensor -> the first of its names
    entries: list[tuple[str, torch.Tensor]] = []
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if skip is not None and skip(name):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"cannot fingerprint {name}: {type(tensor).__name__} is no tensor; leave it out by `skip`")
        first_name.setdefault(id(tensor), name)
        entries.append((name, tensor))

    unique = {name: tensor for name, tensor in entries if first_name[id(tensor)] == name}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(unique, pool.map(_bytes_digest, unique.values()), strict=True))
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in entries:
        first = first_name[id(tensor)]
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), first, digests[first]]).encode() + b"\n")
    config = getattr(model, "config", None)
    if config is not None:
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        total.update(json.dumps(_without_volatile(config), sort_keys=True, default=str).encode())
    else:
        # What such a module computes is determined by its code and its repr.
        total.update(f"{model!r}\n{_source(type(model))}".encode())
    return total.hexdigest()


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        # The class was written interactively: every process gets a new key, so that nothing stale is ever read.
        return f"{kind.__module__}.{kind.__qualname__} in process {os.getpid()}"


def _bytes_digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def _without_volatile(value):
    if isinstance(value, dict):
        return {str(k): _without_volatile(v) for k, v in value.items() if k not in _VOLATILE}
    return [_without_volatile(v) for v in value] if isinstance(value, (list, tuple)) else value


def _keys(examples: Sequence[Mapping]) -> np.ndarray:
    """`example_key` of each. S16 compares all 16 bytes, since what it leaves out at the end it takes for zeros."""
    if isinstance(examples, Examples):
        return examples.keys().view("S16")
    return np.array([example_key(example) for example in examples], dtype="S16")


class _ByKey:
    """Values [2] by key of 16 bytes, 32 bytes each: arrays in the order of the keys, and what came since."""

    def __init__(self):
        self.keys, self.values = np.zeros(0, "S16"), np.zeros((0, 2))
        self.recent: dict[bytes, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self.keys) + len(self.recent)

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """The first value of a key stays."""
        unknown = ~self.find(keys)[1]
        for key, pair in zip(keys[unknown].tolist(), values[unknown].tolist(), strict=True):
            self.recent.setdefault(key, tuple(pair))
        # The arrays grow by a part of their size, so that a key is sorted a few times at most.
        if len(self.recent) > 1000 + len(self.keys) // 4:
            keys = np.concatenate([self.keys, np.array(list(self.recent), dtype="S16")])
            values = np.concatenate([self.values, np.array(list(self.recent.values()))])
            order, self.recent = np.argsort(keys), {}
            self.keys, self.values = keys[order], values[order]

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values [n, 2], NaN where there is none, and whether there is one [n]."""
        values, found = np.full((len(keys), 2), np.nan), np.zeros(len(keys), dtype=bool)
        if len(self.keys):
            at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            found = self.keys[at] == keys
            values[found] = self.values[at[found]]
        if self.recent:
            for i in np.flatnonzero(~found):
                if (pair := self.recent.get(keys[i])) is not None:
                    values[i], found[i] = pair, True
        return values, found


class RefCache:
    """Reference log-probs of one (weights, precision, version, extra) combination.

    folder     directory of all caches, made if absent; a read-only one can be read
    weights    `weights_fingerprint(reference)`
    precision  dtype and mode of the computation, such as "bf16"
    version    version of the code that computes the values
    extra      JSON-able settings that change the values too; None and {} are the same

    An example is a mapping with `prompt_ids`, `chosen_ids`, `rejected_ids` and possibly `rejected_prompt_ids`, which are
    sequences of int; other keys are not read.
    A value is (log p(chosen), log p(rejected)) as float64, in nats. The first value stored for an example stays.
    """

    def __init__(self, folder, *, weights: str, precision: str, version: str, extra: dict | None = None):
        self.header = {"weights": weights, "precision": precision, "version": version, "extra": extra or {}}
        name = hashlib.blake2b(json.dumps(self.header, sort_keys=True).encode(), digest_size=12).hexdigest()
        self.path = Path(folder) / f"ref-{name}.bin"
        self._values = _ByKey()
        self._end = 0  # bytes of the file, in whole records, that _values covers
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            with open(self.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                self._read_new(file)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, example: Mapping) -> tuple[float, float] | None:
        """The value of one example, or None."""
        values, missing = self.lookup([example])
        return None if missing else tuple(values[0].tolist())

    def lookup(self, examples: Sequence[Mapping]) -> tuple[np.ndarray, list[int]]:
        """Values as float64 [n, 2], and the indices that are missing; their rows hold NaN and must be computed."""
        values, found = self._values.find(_keys(examples))
        return values, np.flatnonzero(~found).tolist()

    def put_many(self, examples: Sequence[Mapping], values) -> None:
        """Append `values` (tensor, array or nested list, [n, 2]) and return once they are on disk (fsync).

        Examples that this process or another has stored before are passed over. Raises ValueError and stores nothing if
        the shape is wrong or a value is not finite.
        """
        values = _as_values(values, len(examples))
        for i in np.flatnonzero(~np.isfinite(values).all(axis=1)):
            raise ValueError(f"value {i} is not finite: {values[i].tolist()}; it is not stored")
        keys = _keys(examples)
        with open(self.path, "a+b") as file:  # closing it releases the lock
            fcntl.flock(file, fcntl.LOCK_EX)
            self._read_new(file)
            file.truncate(self._end)
            first = np.sort(np.unique(keys, return_index=True)[1])
            new = first[~self._values.find(keys[first])[1]]
            records = np.zeros(len(new), _RECORD)
            records["key"], records["values"] = keys[new].view("V16"), values[new]
            for record in records:
                record["crc"] = zlib.crc32(record.tobytes()[:_BODY])
            file.write(records.tobytes())
            file.flush()
            os.fsync(file.fileno())
            self._values.add(keys[new], values[new])
            self._end += records.nbytes
            self._write_sidecar()

    def _read_new(self, file) -> None:
        """Read the whole records past `_end`. The caller holds the lock."""
        size = file.seek(0, os.SEEK_END)
        end = size - size % _RECORD.itemsize
        # A file shorter than before was deleted or replaced, so it is read from the start.
        start = self._end if self._end <= end else 0
        file.seek(start)
        data = file.read(end - start)
        records, view = np.frombuffer(data, _RECORD), memoryview(data)
        crc = [zlib.crc32(view[at : at + _BODY]) for at in range(0, len(data), _RECORD.itemsize)]
        whole = records["crc"] == np.array(crc, dtype=np.uint32)
        damaged = len(whole) - int(whole.sum())
        self._values.add(records["key"][whole].view("S16"), records["values"][whole])
        self._end = end
        if damaged:
            what = "1 record of %s is" if damaged == 1 else f"{damaged} records of %s are"
            logger.warning(what + " damaged: what is missing is computed again", self.path)

    def _write_sidecar(self) -> None:
        sidecar = self.path.with_suffix(".json")
        if not sidecar.exists():
            about = f"{self.path.name}: reference log-probs of a DPO run (dpo_fast.training.ref_cache); safe to delete"
            temporary = sidecar.with_suffix(".json.tmp")
            temporary.write_text(json.dumps({"about": about, **self.header}, indent=2) + "\n")
            temporary.replace(sidecar)


def _as_values(values, n: int) -> np.ndarray:
    values = (
        values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, np.float64)
    )
    if values.shape != (n, 2):
        raise ValueError(f"values must have shape ({n}, 2): chosen and rejected of each example; got {values.shape}")
    return values


def compute_missing(
    cache: RefCache,
    examples: Sequence[Mapping],
    batch_size: int,
    compute: Callable[[list[Mapping]], torch.Tensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The finite values of all examples, float64 [len(examples), 2]; computes and stores those that the cache lacks.

    `compute(list of at most batch_size examples)` returns [n, 2] log-probs (chosen, rejected). The longest examples
    come first, so that running out of memory shows at once; an example that occurs twice is computed once. Each batch
    is stored before the next one starts, and an interrupted pass resumes there. `progress(done, total)` is called after
    each batch with the number of examples that this call has computed and has to compute.

    Raises ValueError naming the example if a computed value is not finite (its batch is not stored).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    missing = np.array(cache.lookup(examples)[1], dtype=np.int64)
    first = missing[np.unique(_keys(examples)[missing], return_index=True)[1]]
    lengths = _lengths(examples)
    order = first[np.lexsort((first, -lengths[first].sum(1)))].tolist()
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = [examples[i] for i in indices]
        computed = _as_values(compute(batch), len(batch))
        for i, pair in zip(indices, computed, strict=True):
            if not np.isfinite(pair).all():
                sizes = ", ".join(f"{field} {length}" for field, length in zip(FIELDS, lengths[i], strict=True))
                raise ValueError(
                    f"the reference gives example {i} log-probs {pair.tolist()} (tokens: {sizes}); "
                    "look for an empty completion, ids outside the vocabulary, or an overflow of fp16"
                )
        try:
            cache.put_many(batch, computed)
        except OSError as error:
            if not is_full(error):
                raise
            left = len(order) - start
            what = f"the cache of {left} more reference log-probs"
            kept = "Those computed so far are kept; ref_cache_dir names another folder"
            raise OSError(full_disk(cache.path.parent, left * _RECORD.itemsize, what, kept)) from error
        if progress is not None:
            progress(start + len(batch), len(order))
    return cache.lookup(examples)[0]


def _lengths(examples: Sequence[Mapping]) -> np.ndarray:
    """Tokens of each of `FIELDS`, int64 [n, 3]."""
    if isinstance(examples, Examples):
        return np.stack([examples.lengths(field) for field in FIELDS], axis=1)
    return np.array([[len(example[field]) for field in FIELDS] for example in examples]).reshape(-1, 3)
