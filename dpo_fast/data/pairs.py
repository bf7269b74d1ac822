"""Rows of any layout become the examples that the trainer works on; everything dropped is counted and named."""

import logging
from collections.abc import Mapping

from torch.utils.data import Dataset

from ..forest.packing import check_fits

logger = logging.getLogger(__name__)
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_KEPT = (*_IDS, "rejected_prompt_ids", "p_chosen")


class PairDataset(Dataset):
    """Tokenised pairs: mappings with `prompt_ids`, `chosen_ids`, `rejected_ids`, `index`, and possibly `p_chosen` and
    reference log-probs."""

    def __init__(self, examples: list[dict]):
        self.examples = [{**example, "index": i} for i, example in enumerate(examples)]
        self.computed = False  # whether the reference log-probs were computed here, for one model; the user's are not

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict:
        return self.examples[i]

    def mean_chosen_length(self) -> float:
        """Scored chosen tokens per pair (the first token of a sequence without a prompt is not scored)."""
        scored = [len(e["chosen_ids"]) - (not e["prompt_ids"]) for e in self.examples]
        return sum(scored) / len(scored)

    def set_reference(self, values) -> None:
        """Attach reference log-probs [len(self), 2] (chosen, rejected)."""
        self.computed = True
        for example, (chosen, rejected) in zip(self.examples, values.tolist(), strict=True):
            example["ref_chosen_logps"], example["ref_rejected_logps"] = chosen, rejected


def prepare(rows, tokenizer, args, vocab_size: int | None, name: str, share: str | None = None) -> PairDataset:
    """`rows` (datasets.Dataset, list of mappings, `Pairs`, `TokenizedPairs` or `PairDataset`) as a new PairDataset.

    `share` is what the model can share (default: what was asked for). Raises ValueError for rows that cannot be used,
    where no row is left, for a token outside the vocabulary, and for a pair larger than max_tokens_per_batch.
    """
    examples = getattr(rows, "examples", None)
    if isinstance(rows, PairDataset) and rows.computed:
        # These reference log-probs may be another model's; this run takes its own from the cache.
        examples = [{key: e[key] for key in _KEPT if key in e} for e in examples]
    if examples is None:
        examples = _tokenize(rows, tokenizer, args, vocab_size, name)
    if not examples:
        raise ValueError(f"no usable pair is left in the {name} data: see what was dropped above")
    if vocab_size is not None:
        for i, example in enumerate(examples):
            worst = max(max(example[key], default=0) for key in _IDS)
            if worst >= vocab_size or min(min(example[key], default=0) for key in _IDS) < 0:
                raise ValueError(f"{name} row {i} has a token id outside the model's vocabulary [0, {vocab_size})")
    check_fits(examples, share or args.share, args.max_tokens_per_batch)
    return PairDataset(_with_label_noise(examples, args, name))


def _with_label_noise(examples: list[dict], args, name: str) -> list[dict]:
    """The examples with `p_chosen`, the chance that the chosen one is really better, either in all or in none."""
    missing = [i for i, example in enumerate(examples) if example.get("p_chosen") is None]
    if len(missing) == len(examples):
        if name == "train" and args.label_noise in ("smoothing", "weight"):
            raise ValueError(f"label_noise={args.label_noise!r} has no effect: no row of the data has a p_chosen")
        return [{key: x for key, x in example.items() if key != "p_chosen"} for example in examples]
    if args.label_noise == "ignore":
        return [{key: x for key, x in example.items() if key != "p_chosen"} for example in examples]
    if missing:
        raise ValueError(
            f"{name} row {missing[0]} has no p_chosen and others have one: give every row one (1 where the label is "
            "certain), or label_noise='ignore'"
        )
    for i, example in enumerate(examples):
        value = example["p_chosen"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{name} row {i}: p_chosen is {value!r}: give a number in [0, 1], or label_noise='ignore'")
    args.check_p_chosen([example["p_chosen"] for example in examples], name)
    return examples


def _tokenize(rows, tokenizer, args, vocab_size, name) -> list[dict]:
    from .sources import Pairs, normalise_rows
    from .tokenization import tokenize_pairs

    if not isinstance(rows, Pairs):
        if name == "train" and not hasattr(rows, "__len__"):  # evaluation reads all of it anyway
            raise ValueError(
                "the train data is streamed, and its length must be known (precompute_ref_log_probs is not supported with "
                "IterableDataset either): load it without streaming"
            )
        rows = list(rows)
        if rows and isinstance(rows[0], Mapping) and all(key in rows[0] for key in _IDS):
            return _truncate(rows, args, name)
        rows = normalise_rows(rows, where=name, skip_bad_rows=args.skip_bad_rows)
    if tokenizer is None:
        raise ValueError(f"the {name} data is text: pass processing_class (the tokenizer)")
    tokenized = tokenize_pairs(
        rows.rows,
        tokenizer,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        vocab_size=vocab_size,
        skip_bad_rows=args.skip_bad_rows,
        log=logger.info,
    )
    for warning in tokenized.warnings:
        logger.warning("%s data: %s", name, warning)
    if tokenized.dropped:
        logger.warning("%s data: %d pairs dropped, first: %s", name, len(tokenized.dropped), tokenized.dropped[0])
    return tokenized.examples


def _truncate(rows: list[Mapping], args, name: str) -> list[dict]:
    from .tokenization import truncate

    examples = []
    for i, row in enumerate(rows):
        ids = [list(row[key]) for key in _IDS]
        for key, side in zip(_IDS[1:], ids[1:], strict=True):
            if not side:
                raise ValueError(f"{name} row {i}: {key} is empty: drop the pair")
        example = truncate(*ids, max_length=args.max_length, truncation_mode=args.truncation_mode)
        if example is None:
            logger.warning("%s row %d dropped: its prompt fills max_length=%d", name, i, args.max_length)
        else:
            noise = {"p_chosen": row["p_chosen"]} if row.get("p_chosen") is not None else {}
            examples.append(example | noise)
    return examples
