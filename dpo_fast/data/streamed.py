"""`StreamedPairs`: a `datasets.IterableDataset` of rows, normalised and tokenised as they come."""

import itertools
import logging
from collections.abc import Callable, Iterator

from torch.utils.data import IterableDataset

from .examples import FIELDS, Examples
from .readers import DataError
from .sources import records
from .tokens import check_tokenizer, tokens_of, truncated_row

logger = logging.getLogger(__name__)
_ROWS = 64  # that are read and tokenised together
_HEAD = 16  # pairs that are looked at before training


class StreamedPairs(IterableDataset):
    """Examples as `PairDataset` gives them, in the stream's order, without a length; `index` counts them.

    rows: a `datasets.IterableDataset` of rows of any layout, or with ids. options: those of `tokens.tokens_of`.
    check: gives back the examples of a few rows, counted from its second argument, or raises ValueError.
    `examples` are the first pairs, for what is checked before training. With skip_bad_rows the first row that is left out
    is named in a warning, and `dropped` lists those of the present pass.

    Raises DataError where the stream begins with no usable pair.
    """

    computed = False  # see PairDataset

    def __init__(self, rows, tokenizer, options: dict, name: str, check: Callable[[Examples, int], Examples]):
        self.rows, self.tokenizer, self.options, self.name, self.check = rows, tokenizer, options, name, check
        self.max_length: int | None = options["max_length"]
        self.dropped: list[tuple[str, str]] = []
        self._noise: bool | None = None  # whether pairs have a p_chosen
        self._text: bool | None = None  # whether rows are text, not messages
        head = list(itertools.islice(self, _HEAD))
        if not head:
            raise DataError(f"no usable pair in the {name} data, which is streamed")
        self.examples = Examples.of(head)

    def set_epoch(self, epoch: int) -> None:
        """Another order, where the stream is shuffled."""
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        first, index, self.dropped = 0, 0, []
        stream = iter(self.rows)
        while rows := list(itertools.islice(stream, _ROWS)):
            made = (
                self._with_ids(rows, first) if all(key in rows[0] for key in FIELDS) else self._tokenised(rows, first)
            )
            first += len(rows)
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

    def _with_ids(self, rows: list[dict], first: int) -> list[dict]:
        cut = {name: self.options[name] for name in ("max_length", "truncation_mode")}
        places = [f"{self.name} row {first + i}" for i in range(len(rows))]
        return self._kept(places, [truncated_row(r, p, **cut) for r, p in zip(rows, places, strict=True)])

    def _tokenised(self, rows: list[dict], first: int) -> list[dict]:
        if self.tokenizer is None:
            raise ValueError(f"the {self.name} data is text: pass processing_class (the tokenizer)")
        pairs, places = [], []
        located = ((f"{self.name} row {first + i}", row) for i, row in enumerate(rows))
        for record in records(located, "all", self.options["skip_bad_rows"]):
            if "reason" in record:
                self._drop(record["place"], record["reason"])
                continue
            pairs.append(record["pair"])
            places.append(record["place"])
            text = isinstance(record["pair"]["chosen"], str)
            if self._text not in (None, text):
                raise DataError(f"text and messages are mixed: {record['place']} is the first of the other kind")
            self._text = text
        if not pairs:
            return []
        check_tokenizer(self.tokenizer, self._text, not self._text)
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
        if not self.dropped:
            logger.warning("%s is left out, and maybe others: %s", place, reason)
        self.dropped.append((place, reason))
