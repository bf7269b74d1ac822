"""`StreamedPairs`: rows of a `datasets.IterableDataset`, or of files and the hub, normalised and tokenised as they come."""

import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping

from torch.utils.data import IterableDataset

from .examples import FIELDS, Examples
from .readers import DataError, Source, read_source
from .sources import records
from .tokens import check_tokenizer, tokens_of, truncated_row

logger = logging.getLogger(__name__)
_ROWS = 64  # that are read and tokenised together
_HEAD = 16  # pairs that are looked at before training


class SourceRows:
    """(place, row) of every row of `sources`, one source after the other, read again in every pass.

    `split` holds for directories and hub names whose Source names none.
    """

    def __init__(self, sources: list[Source], split: str = "train", ranking_pairs: str = "all"):
        self.sources, self.split, self.ranking_pairs = sources, split, ranking_pairs

    def __iter__(self) -> Iterator[tuple[str, object]]:
        for source in self.sources:
            yield from read_source(source, self.split, streaming=True)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: every pass has the order of the files."""


class _DatasetRows:
    """The same of a `datasets.IterableDataset`, whose rows may also be ids."""

    ranking_pairs = "all"

    def __init__(self, rows, name: str):
        self.rows, self.name = rows, name

    def __iter__(self) -> Iterator[tuple[str, object]]:
        return ((f"{self.name} row {i}", row) for i, row in enumerate(self.rows))

    def set_epoch(self, epoch: int) -> None:
        """Another order, where the stream is shuffled."""
        self.rows.set_epoch(epoch)


def is_stream(rows) -> bool:
    """Whether rows are read while the model trains on them."""
    return isinstance(rows, SourceRows | StreamedPairs) or is_of_datasets(rows, "IterableDataset")


def is_of_datasets(rows, kind: str) -> bool:
    """Whether rows are an object of that class of `datasets`. Rows with ids need no `datasets`, so it is not imported here."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(rows, getattr(datasets, kind, ()))


class StreamedPairs(IterableDataset):
    """Examples as `PairDataset` gives them, in the stream's order, without a length; `index` counts them.

    rows: a `datasets.IterableDataset` of rows of any layout, or with ids; or `SourceRows`. options: those of `tokens.tokens_of`.
    check: gives back the examples of a few rows, counted from its second argument, or raises ValueError.
    `examples` are the first pairs, for what is checked before training, and `text` says whether they are text, not
    messages (None: ids). With skip_bad_rows the first row that is left out is named in a warning, and `dropped` lists
    those of the present pass.

    Raises DataError where the stream begins with no usable pair.
    """

    computed = False  # see PairDataset

    def __init__(self, rows, tokenizer, options: dict, name: str, check: Callable[[Examples, int], Examples]):
        self.rows = rows if isinstance(rows, SourceRows) else _DatasetRows(rows, name)
        self.tokenizer, self.options, self.name, self.check = tokenizer, options, name, check
        self.max_length: int | None = options["max_length"]
        self.dropped: list[tuple[str, str]] = []
        self.text: bool | None = None
        self._noise: bool | None = None  # whether pairs have a p_chosen
        self._named = True  # whether a row that is left out was named; an error below names one itself
        head = list(itertools.islice(self, _HEAD))
        if not head:
            why = f"; the first row left out is {': '.join(self.dropped[0])}" if self.dropped else ""
            raise DataError(f"no usable pair in the {name} data, which is streamed{why}")
        self.examples, self._named = Examples.of(head), False
        self._name_dropped()

    def set_epoch(self, epoch: int) -> None:
        """Another order, where the stream is shuffled."""
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        index, self.dropped = 0, []
        stream = iter(self.rows)
        while located := list(itertools.islice(stream, _ROWS)):
            first = located[0][1]
            ids = (
                isinstance(self.rows, _DatasetRows)
                and isinstance(first, Mapping)
                and all(key in first for key in FIELDS)
            )
            made = self._with_ids(located) if ids else self._tokenised(located)
            if not made:
                continue
            examples = self.check(Examples.of(made), index)
            noise = "p_chosen" in examples[0]
            if self._noise not in (None, noise):
                raise ValueError(f"some rows of the {self.name} data have a p_chosen, others none: see label_noise")
            self._noise = noise
            for example in examples:
                yield example | {"index": index}
                index += 1

    def _with_ids(self, located: list[tuple[str, dict]]) -> list[dict]:
        cut = {name: self.options[name] for name in ("max_length", "truncation_mode")}
        return self._kept([place for place, _ in located], [truncated_row(row, place, **cut) for place, row in located])

    def _tokenised(self, located: list[tuple[str, object]]) -> list[dict]:
        if self.tokenizer is None:
            raise ValueError(f"the {self.name} data is text: pass processing_class (the tokenizer)")
        pairs, places = [], []
        for record in records(located, self.rows.ranking_pairs, self.options["skip_bad_rows"]):
            if "reason" in record:
                self._drop(record["place"], record["reason"])
                continue
            pairs.append(record["pair"])
            places.append(record["place"])
            text = isinstance(record["pair"]["chosen"], str)
            if self.text not in (None, text):
                raise DataError(f"text and messages are mixed: {record['place']} is the first of the other kind")
            self.text = text
        if not pairs:
            return []
        check_tokenizer(self.tokenizer, self.text, not self.text)
        return self._kept(places, tokens_of(pairs, places, self.tokenizer, **self.options))

    def _kept(self, places, found) -> list[dict]:
        made = []
        for place, tokens in zip(places, found, strict=True):
            if tokens.example is None:
                self._drop(place, tokens.reason)
            else:
                made.append(tokens.example)
        return made

    def _drop(self, place: str, reason: str) -> None:
        self.dropped.append((place, reason))
        self._name_dropped()

    def _name_dropped(self) -> None:
        if self.dropped and not self._named:
            logger.warning("%s is left out, and maybe others: %s", *self.dropped[0])
            self._named = True
