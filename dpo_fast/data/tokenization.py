"""Rows to token ids: `tokenize_pairs`, in memory or, through mapped.py, on disk. What becomes of one row is in tokens.py."""

from collections.abc import Callable, Sequence

from .mapped import map_rows
from .readers import DataError
from .tokens import ROWS_A_CALL, TokenizedPairs, check_tokenizer, is_text, tokens_of


def tokenize_pairs(
    rows: Sequence[dict],
    tokenizer,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    vocab_size: int | None = None,
    skip_bad_rows: bool = False,
    num_proc: int | None = None,
    progress: bool = False,
    log: Callable[[str], None] = print,
) -> TokenizedPairs:
    """Ids of normalised rows (sources.py): text gets the EOS unless it ends with it, messages get the chat template.

    `max_length` is the largest number of tokens of prompt + completion (None: no limit); `truncate` says what stays.
    `vocab_size` is the number of rows of the model's embedding, which ids are checked against.
    With more than one process (`num_proc`), and for rows on disk (`store.Rows`), `datasets` maps the rows; what it made of
    rows on disk is found again with the same tokenizer and options. The examples are then `Examples`.
    Raises ValueError for a tokenizer without the EOS or chat template that the rows need and for ids that the model does
    not have. Raises DataError for a row that the template refuses or that has no token to score (dropped with
    skip_bad_rows), and when no pair is left.
    The semantics are those of TRL 1.16's `DPOTrainer._prepare_dataset` and `DataCollatorForPreference`.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length}: a prompt and one token to score need at least 2")
    options = {
        "max_length": max_length,
        "truncation_mode": truncation_mode,
        "vocab_size": vocab_size,
        "skip_bad_rows": skip_bad_rows,
    }
    if (num_proc is not None and num_proc > 1) or not isinstance(rows, list):
        result = map_rows(rows, tokenizer, options, num_proc, progress)
    else:
        result = TokenizedPairs()
        check_tokenizer(tokenizer, any(map(is_text, rows)), not all(map(is_text, rows)))
        for start in range(0, len(rows), ROWS_A_CALL):
            places = [f"row {index}" for index in range(start, min(start + ROWS_A_CALL, len(rows)))]
            for i, found in enumerate(tokens_of(rows[start : start + ROWS_A_CALL], places, tokenizer, **options)):
                result.add(start + i, found)
    if not result.examples:
        index, reason = result.dropped[0] if result.dropped else (0, "there are no rows")
        raise DataError(f"no pair is left of {len(rows)} rows; the first dropped is row {index}: {reason}")
    _warn(result, len(rows), max_length, truncation_mode)
    for text in result.warnings:
        log(text)
    return result


def _warn(result: TokenizedPairs, rows: int, max_length: int | None, truncation_mode: str) -> None:
    warn = result.warnings.append
    if result.first_clipped:
        index, tail = result.first_clipped
        warn(
            f"in {result.clipped} of {rows} rows the prompt alone ends in other tokens than before its completion; that "
            f"end is left out of training (row {index}: {tail!r}). Usually the chat template renders the prompt "
            "differently alone, or a text prompt does not end at a token boundary"
        )
    if result.double_bos:
        warn(f"{result.double_bos} of {rows} rows begin with two BOS tokens: remove the BOS text from the data")
    filled = sum(reason.startswith("the prompt fills max_length") for _, reason in result.dropped)
    if filled:
        warn(f"{filled} of {rows} rows dropped: the prompt alone fills max_length={max_length}")
    if result.truncated:
        lost = "have a completion cut" if truncation_mode == "keep_start" else "lose their start, cut"
        warn(f"{result.truncated} of {rows} pairs {lost} at max_length={max_length}")
    if result.identical:
        warn(
            f"{result.identical} of {rows} pairs have the same tokens on both sides: a margin loss learns nothing there"
        )
    others = len(result.dropped) - filled
    if others:
        index, reason = next(d for d in result.dropped if not d[1].startswith("the prompt fills max_length"))
        warn(f"{others} of {rows} rows dropped as unusable (first: row {index}, {reason})")
