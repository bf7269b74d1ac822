"""Token ids of pairs: prompt | chosen | rejected, as TRL's DPOTrainer makes them.

Each row is tokenised three times (prompt, prompt + chosen, prompt + rejected), because the tokens of a text depend on
what follows it. The prompt ends where its own ids and one of the two full sequences first differ, so that both
completions continue from the same ids. Layouts are read in layouts.py; batches are built in forest/.
"""

import dataclasses
from collections.abc import Callable

from jinja2 import TemplateError

from ..forest.packing import common_prefix_length
from .sources import DataError

ROWS_A_CALL = 1024


@dataclasses.dataclass
class TokenizedPairs:
    """Examples `{"prompt_ids", "chosen_ids", "rejected_ids"}` (lists of int, already truncated) and what was lost.

    An example keeps the `p_chosen` of its row.

    dropped: (index into the rows, reason). truncated: the number of pairs that max_length cut. identical: the number of
    kept pairs whose completions have the same ids (a margin loss has no gradient there). warnings: sentences for the user.
    """

    examples: list[dict[str, list[int]]] = dataclasses.field(default_factory=list)
    dropped: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    truncated: int = 0
    identical: int = 0
    warnings: list[str] = dataclasses.field(default_factory=list)


def tokenize_pairs(
    rows: list[dict],
    tokenizer,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    vocab_size: int | None = None,
    skip_bad_rows: bool = False,
    log: Callable[[str], None] = print,
) -> TokenizedPairs:
    """Ids of normalised rows (sources.py): text gets the EOS unless it ends with it, messages get the chat template.

    `max_length` is the largest number of tokens of prompt + completion (None: no limit); `truncate` says what stays.
    `vocab_size` is the number of rows of the model's embedding, which ids are checked against.
    Raises ValueError for a tokenizer without the EOS or chat template that the rows need and for ids that the model does
    not have. Raises DataError for a row that the template refuses or that has no token to score (dropped with
    skip_bad_rows), and when no pair is left.
    The semantics are those of TRL 1.16's `DPOTrainer._prepare_dataset` and `DataCollatorForPreference`.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length}: a prompt and one token to score need at least 2")
    _check_tokenizer(rows, tokenizer)
    result = TokenizedPairs()
    clipped: list[tuple[int, str]] = []  # rows whose prompt loses tokens at its end, with those tokens as text
    double_bos = 0

    def bad(index: int, reason: str) -> None:
        if not skip_bad_rows:
            raise DataError(f"row {index}: {reason}. Mend the row, or leave such rows out with skip_bad_rows=True")
        result.dropped.append((index, reason))

    for start in range(0, len(rows), ROWS_A_CALL):
        for index, row_ids in enumerate(_three_tokenisations(rows[start : start + ROWS_A_CALL], tokenizer), start):
            if isinstance(row_ids, str):
                bad(index, row_ids)
                continue
            alone, *full = row_ids
            n = min(common_prefix_length(alone, ids) for ids in full)
            if n < len(alone):
                clipped.append((index, tokenizer.decode(alone[n:])))
            prompt, sides = alone[:n], [ids[n:] for ids in full]
            # The first token of a sequence has no predecessor, so it cannot be scored.
            if any(len(ids) < (1 if prompt else 2) for ids in sides):
                bad(index, "a completion has no token to score")
                continue
            example = truncate(prompt, *sides, max_length=max_length, truncation_mode=truncation_mode)
            if example is None:
                result.dropped.append((index, f"the prompt fills max_length: {len(prompt)} tokens"))
                continue
            result.truncated += max_length is not None and len(prompt) + max(map(len, sides)) > max_length
            result.identical += example["chosen_ids"] == example["rejected_ids"]
            double_bos += len(prompt) > 1 and prompt[0] == prompt[1] == tokenizer.bos_token_id
            if vocab_size is not None:
                _check_ids(index, [prompt, *sides], vocab_size, tokenizer)
            noise = {"p_chosen": rows[index]["p_chosen"]} if "p_chosen" in rows[index] else {}
            result.examples.append(example | noise)
    if not result.examples:
        index, reason = result.dropped[0] if result.dropped else (0, "there are no rows")
        raise DataError(f"no pair is left of {len(rows)} rows; the first dropped is row {index}: {reason}")
    _warn(result, len(rows), max_length, truncation_mode, clipped, double_bos)
    for text in result.warnings:
        log(text)
    return result


def truncate(
    prompt: list[int], chosen: list[int], rejected: list[int], *, max_length: int | None, truncation_mode: str
) -> dict[str, list[int]] | None:
    """The example of a pair, cut to sequences of at most `max_length` tokens; None where no completion would be left.

    With keep_start the completions lose their ends. With keep_end each sequence loses its start, tokens of the prompt
    first, so that the rejected completion may follow another end of the prompt, `rejected_prompt_ids`.
    """
    if max_length is None or len(prompt) + max(len(chosen), len(rejected)) <= max_length:
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    if truncation_mode == "keep_start":
        room = max_length - len(prompt)
        return (
            {"prompt_ids": prompt, "chosen_ids": chosen[:room], "rejected_ids": rejected[:room]} if room > 0 else None
        )
    ends = [(prompt + side)[-max_length:] for side in (chosen, rejected)]
    kept = [max(len(end) - len(side), 0) for end, side in zip(ends, (chosen, rejected), strict=True)]
    example = {"prompt_ids": ends[0][: kept[0]], "chosen_ids": ends[0][kept[0] :], "rejected_ids": ends[1][kept[1] :]}
    return example if kept[0] == kept[1] else {**example, "rejected_prompt_ids": ends[1][: kept[1]]}


def _is_text(row: dict) -> bool:
    return isinstance(row["chosen"], str)


def _check_tokenizer(rows: list[dict], tokenizer) -> None:
    if tokenizer.eos_token is None and any(map(_is_text, rows)):
        raise ValueError("the tokenizer has no EOS token to end plain text with: set tokenizer.eos_token")
    if not getattr(tokenizer, "chat_template", None) and not all(map(_is_text, rows)):
        raise ValueError(
            "the data are messages and the tokenizer has no chat template: use a model with one (usually the name "
            "ends in -Instruct), or pass a template with --chat_template_path FILE (tokenizer.chat_template = ...)"
        )


def _three_tokenisations(rows: list[dict], tokenizer) -> list[list[list[int]] | str]:
    """Ids of prompt, prompt + chosen and prompt + rejected of each row, or a text that says what is wrong with it."""
    texts = [_text_row(row, tokenizer.eos_token) if _is_text(row) else _render(row, tokenizer) for row in rows]
    # A template writes its special tokens itself; plain text gets those that the tokenizer adds.
    plain = _encode([t for row, t in zip(rows, texts, strict=True) if _is_text(row)], tokenizer, True)
    chat = _encode([t for row, t in zip(rows, texts, strict=True) if not _is_text(row)], tokenizer, False)
    return [next(plain if _is_text(row) else chat) for row in rows]


def _encode(rows: list[list[str] | str], tokenizer, add_special_tokens: bool):
    """An iterator over the ids of each row's texts; one call tokenises equal texts once (rankings repeat them)."""
    distinct = list(dict.fromkeys(text for texts in rows if isinstance(texts, list) for text in texts))
    ids = {}
    if distinct:
        encoded = tokenizer(
            distinct, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]
        ids = dict(zip(distinct, encoded, strict=True))
    return iter([[ids[text] for text in texts] if isinstance(texts, list) else texts for texts in rows])


def _text_row(row: dict, eos: str) -> list[str]:
    sides = [side if side.endswith(eos) else side + eos for side in (row["chosen"], row["rejected"])]
    return [row["prompt"], *(row["prompt"] + side for side in sides)]


def _render(row: dict, tokenizer) -> list[str] | str:
    """The chat template's text of the prompt (with its generation prompt), prompt + chosen and prompt + rejected."""
    options = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {}), "tokenize": False}
    prompt = row["prompt"]
    try:
        return [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options),
            tokenizer.apply_chat_template(prompt + row["chosen"], **options),
            tokenizer.apply_chat_template(prompt + row["rejected"], **options),
        ]
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        return f"the chat template refuses the messages: {error}"


def _check_ids(index: int, parts: list[list[int]], vocab_size: int, tokenizer) -> None:
    largest = max(max(ids, default=0) for ids in parts)
    if largest >= vocab_size:
        raise ValueError(
            f"row {index}: token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, the model knows ids "
            f"below {vocab_size} and the tokenizer holds {len(tokenizer)}: use the model's own tokenizer, or add rows "
            "with model.resize_token_embeddings(len(tokenizer))"
        )


def _warn(
    result: TokenizedPairs, rows: int, max_length: int | None, truncation_mode: str, clipped: list, double_bos: int
) -> None:
    warn = result.warnings.append
    if clipped:
        index, tail = clipped[0]
        warn(
            f"in {len(clipped)} of {rows} rows the prompt alone ends in other tokens than before its completion; that "
            f"end is left out of training (row {index}: {tail!r}). Usually the chat template renders the prompt "
            "differently alone, or a text prompt does not end at a token boundary"
        )
    if double_bos:
        warn(f"{double_bos} of {rows} rows begin with two BOS tokens: remove the BOS text from the data")
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
