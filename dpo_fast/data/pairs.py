"""Rows of any layout become the examples that the trainer works on; everything dropped is counted and named."""

import functools
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from torch.utils.data import Dataset

from ..forest.packing import check_fits
from .examples import FIELDS, Examples
from .streamed import StreamedPairs, is_of_datasets, is_stream

logger = logging.getLogger(__name__)


class PairDataset(Dataset):
    """Tokenised pairs: a thin view of `Examples`, mappings with `prompt_ids`, `chosen_ids`, `rejected_ids` (int32 arrays),
    `index`, and maybe `p_chosen` and reference log-probs.

    Raises ValueError for examples whose ids are not flat sequences of ints.
    """

    def __init__(self, examples: Sequence[Mapping]):
        self.examples = Examples.of(examples)
        self.computed = False  # whether the reference log-probs were computed here, for one model; the user's are not

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict:
        """One example with lists of token ids, as TRL's data sets have them."""
        return {key: x.tolist() if isinstance(x, np.ndarray) else x for key, x in self.examples[i].items()}

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """What a DataLoader fetches: token ids as they lie in the columns."""
        return [self.examples[i] for i in indices]

    def mean_chosen_length(self) -> float:
        """Scored chosen tokens per pair (the first token of a sequence without a prompt is not scored)."""
        lengths = self.examples.lengths
        return int(lengths("chosen_ids").sum() - (lengths("prompt_ids") == 0).sum()) / len(self)

    def set_reference(self, values) -> None:
        """Attach reference log-probs [len(self), 2] (chosen, rejected)."""
        self.computed = True
        self.examples = self.examples.replace(reference=np.asarray(values, dtype=np.float64))


def prepare(
    rows, tokenizer, args, vocab_size: int | None, name: str, share: str | None = None
) -> PairDataset | StreamedPairs:
    """`rows` (datasets.Dataset, list of mappings, `Pairs`, `TokenizedPairs` or `PairDataset`) as a new PairDataset.

    A datasets.IterableDataset of training rows, or `SourceRows`, becomes `StreamedPairs`.
    `share` is what the model can share (default: what was asked for). Raises ValueError for rows that cannot be used,
    where no row is left, for a token outside the vocabulary, and for a pair larger than max_tokens_per_batch.
    """
    check = functools.partial(_checked, args=args, vocab_size=vocab_size, name=name, share=share or args.share)
    if isinstance(rows, Mapping):
        raise ValueError(f"the {name} data is a dict of {', '.join(map(repr, rows))}: pass one of its values")
    if isinstance(rows, StreamedPairs):
        return rows
    if name == "train" and is_stream(rows):
        options = {name: getattr(args, name) for name in ("max_length", "truncation_mode", "skip_bad_rows")}
        return StreamedPairs(rows, tokenizer, options | {"vocab_size": vocab_size}, name, check)
    examples = getattr(rows, "examples", None)
    if examples is None:
        examples = _tokenize(rows, tokenizer, args, vocab_size, name)
    if not examples:
        raise ValueError(f"no usable pair is left in the {name} data: see what was dropped above")
    examples = Examples.of(examples)
    if isinstance(rows, PairDataset) and rows.computed:
        # These reference log-probs may be another model's; this run takes its own from the cache.
        examples = examples.replace(reference=None)
    return PairDataset(check(examples))


def _checked(examples: Examples, first: int = 0, *, args, vocab_size: int | None, name: str, share: str) -> Examples:
    """The examples that can be trained on; messages count them from `first`. Raises ValueError as `prepare` does."""
    if vocab_size is not None:
        wrong = (examples.column("largest") >= vocab_size) | (examples.column("smallest") < 0)
        if wrong.any():
            i = int(wrong.argmax())
            raise ValueError(f"{name} row {first + i} has a token id outside the model's vocabulary [0, {vocab_size})")
    if args.max_tokens_per_batch is not None:
        check_fits(examples.pair_tokens(share), args.max_tokens_per_batch)
    return _with_label_noise(examples, args, name, first)


def _with_label_noise(examples: Examples, args, name: str, first: int) -> Examples:
    """The examples with `p_chosen`, the chance that the chosen one is really better, either in all or in none."""
    odd, missing = examples.odd_p_chosen(), examples.missing("p_chosen")
    if missing.all() and not odd:
        if name == "train" and args.label_noise in ("smoothing", "weight"):
            raise ValueError(f"label_noise={args.label_noise!r} has no effect: no row of the data has a p_chosen")
        return examples.replace(noise=False)
    if args.label_noise == "ignore":
        return examples.replace(noise=False)
    missing[list(odd)] = False
    if missing.any():
        raise ValueError(
            f"{name} row {first + int(missing.argmax())} has no p_chosen and others have one: give every row one (1 where "
            "the label is certain), or label_noise='ignore'"
        )
    values = examples.column("p_chosen")
    outside = ~((values >= 0) & (values <= 1))
    if outside.any():
        i = int(outside.argmax())
        value = odd.get(i, repr(float(values[i])))
        raise ValueError(
            f"{name} row {first + i}: p_chosen is {value}: give a number in [0, 1], or label_noise='ignore'"
        )
    args.check_p_chosen(values, name)
    return examples


def _tokenize(rows, tokenizer, args, vocab_size, name) -> Sequence[Mapping]:
    from .sources import Pairs, normalise_rows
    from .tokenization import tokenize_pairs

    cut = {"max_length": args.max_length, "truncation_mode": args.truncation_mode}
    how = {"num_proc": args.dataset_num_proc, "progress": not args.disable_tqdm and args.process_index == 0}
    if not isinstance(rows, Pairs):
        if name == "train" and not hasattr(rows, "__len__"):  # evaluation reads all of it anyway
            raise ValueError(
                "the train data has no length: give a list, a datasets.Dataset, or, to stream, a datasets.IterableDataset"
            )
        on_disk = is_of_datasets(rows, "Dataset")
        rows = rows if on_disk else list(rows)
        if len(rows) and isinstance(rows[0], Mapping) and all(key in rows[0] for key in FIELDS):
            if not on_disk:
                return _truncate(rows, cut, name)
            from .mapped import map_ids

            return _without_dropped(map_ids(rows, {"name": name, **cut}, **how), name)
        rows = normalise_rows(rows, where=name, skip_bad_rows=args.skip_bad_rows, cache=on_disk)
    if tokenizer is None:
        raise ValueError(f"the {name} data is text: pass processing_class (the tokenizer)")
    tokenized = tokenize_pairs(
        rows.rows,
        tokenizer,
        vocab_size=vocab_size,
        skip_bad_rows=args.skip_bad_rows,
        log=logger.info,
        **cut,
        **how,
    )
    for warning in tokenized.warnings:
        logger.warning("%s data: %s", name, warning)
    return _without_dropped(tokenized, name)


def _without_dropped(tokenized, name: str) -> Sequence[Mapping]:
    if tokenized.dropped:
        logger.warning("%s data: %d pairs dropped, first: %s", name, len(tokenized.dropped), tokenized.dropped[0])
    return tokenized.examples


def _truncate(rows: list[Mapping], cut: dict, name: str) -> list[Mapping]:
    from .tokens import truncated_row

    examples = []
    for i, row in enumerate(rows):
        tokens = truncated_row(row, f"{name} row {i}", **cut)
        if tokens.example is None:
            logger.warning("%s row %d dropped: %s", name, i, tokens.reason)
        else:
            examples.append(tokens.example)
    return examples
