"""Token ids of a row: prompt | chosen | rejected, as TRL's DPOTrainer makes them, or why the row is left out.

Each row is tokenised three times (prompt, prompt + chosen, prompt + rejected), because the tokens of a text depend on
what follows it. The prompt ends where its own ids and one of the two full sequences first differ, so that both
completions continue from the same ids. Layouts are read in layouts.py; batches are built in forest/.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from jinja2 import TemplateError

from ..forest.trie import common_prefix_length
from .examples import FIELDS
from .readers import DataError

ROWS_A_CALL = 1024


@dataclasses.dataclass(slots=True)
class Tokens:
    """What became of one row: `example`, or None and why it is left out in `reason`."""

    example: dict[str, list[int]] | None = None
    reason: str | None = None
    tail: str | None = None  # what the prompt loses at its end, as text
    truncated: bool = False
    identical: bool = False
    double_bos: bool = False


def tokens_of(
    rows: list[dict], places: list[str], tokenizer, *, max_length, truncation_mode, vocab_size, skip_bad_rows
) -> Iterator[Tokens]:
    """`Tokens` of each row, in order; one call of the tokenizer. `places` name the rows in messages."""
    for row, place, row_ids in zip(rows, places, _three_tokenisations(rows, tokenizer), strict=True):
        found = Tokens()
        if isinstance(row_ids, str):
            yield _bad(place, row_ids, skip_bad_rows)
            continue
        alone, *full = row_ids
        n = min(common_prefix_length(alone, ids) for ids in full)
        if n < len(alone):
            found.tail = tokenizer.decode(alone[n:])
        prompt, sides = alone[:n], [ids[n:] for ids in full]
        # The first token of a sequence has no predecessor, so it cannot be scored.
        if any(len(ids) < (1 if prompt else 2) for ids in sides):
            bad = _bad(place, "a completion has no token to score", skip_bad_rows)
            yield dataclasses.replace(bad, tail=found.tail)
            continue
        example = truncate(prompt, *sides, max_length=max_length, truncation_mode=truncation_mode)
        if example is None:
            found.reason = f"the prompt fills max_length: {len(prompt)} tokens"
            yield found
            continue
        found.truncated = max_length is not None and len(prompt) + max(map(len, sides)) > max_length
        found.identical = example["chosen_ids"] == example["rejected_ids"]
        found.double_bos = len(prompt) > 1 and prompt[0] == prompt[1] == tokenizer.bos_token_id
        if vocab_size is not None:
            _check_ids(place, [prompt, *sides], vocab_size, tokenizer)
        found.example = example | ({"p_chosen": row["p_chosen"]} if "p_chosen" in row else {})
        yield found


def _bad(place: str, reason: str, skip_bad_rows: bool) -> Tokens:
    if not skip_bad_rows:
        raise DataError(f"{place}: {reason}. Mend the row, or leave such rows out with skip_bad_rows=True")
    return Tokens(reason=reason)


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


def truncated_row(row, place: str, max_length: int | None, truncation_mode: str) -> Tokens:
    """`Tokens` of a row with ids. Raises ValueError where a completion is empty."""
    ids = [list(row[key]) for key in FIELDS]
    for key, side in zip(FIELDS[1:], ids[1:], strict=True):
        if not side:
            raise ValueError(f"{place}: {key} is empty: drop the pair")
    example = truncate(*ids, max_length=max_length, truncation_mode=truncation_mode)
    if example is None:
        return Tokens(reason=f"its prompt fills max_length={max_length}")
    return Tokens(example | ({"p_chosen": row["p_chosen"]} if row.get("p_chosen") is not None else {}))


def is_text(row: dict) -> bool:
    """Whether a normalised row is plain text; else it is messages."""
    return isinstance(row["chosen"], str)


def check_tokenizer(tokenizer, text: bool, messages: bool) -> None:
    """Raise ValueError where it lacks what rows of text, or of messages, need."""
    if tokenizer.eos_token is None and text:
        raise ValueError("the tokenizer has no EOS token to end plain text with: set tokenizer.eos_token")
    if not getattr(tokenizer, "chat_template", None) and messages:
        raise ValueError(
            "the data are messages and the tokenizer has no chat template: use a model with one (usually the name "
            "ends in -Instruct), or pass a template with --chat_template_path FILE (tokenizer.chat_template = ...)"
        )


def _three_tokenisations(rows: list[dict], tokenizer) -> list[list[list[int]] | str]:
    """Ids of prompt, prompt + chosen and prompt + rejected of each row, or a text that says what is wrong with it."""
    texts = [_text_row(row, tokenizer.eos_token) if is_text(row) else _render(row, tokenizer) for row in rows]
    # A template writes its special tokens itself; plain text gets those that the tokenizer adds.
    plain = _encode([t for row, t in zip(rows, texts, strict=True) if is_text(row)], tokenizer, True)
    chat = _encode([t for row, t in zip(rows, texts, strict=True) if not is_text(row)], tokenizer, False)
    return [next(plain if is_text(row) else chat) for row in rows]


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


def _check_ids(place: str, parts: list[list[int]], vocab_size: int, tokenizer) -> None:
    largest = max(max(ids, default=0) for ids in parts)
    if largest >= vocab_size:
        raise ValueError(
            f"{place}: token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, the model knows ids "
            f"below {vocab_size} and the tokenizer holds {len(tokenizer)}: use the model's own tokenizer, or add rows "
            "with model.resize_token_embeddings(len(tokenizer))"
        )


@dataclasses.dataclass
class TokenizedPairs:
    """Examples `{"prompt_ids", "chosen_ids", "rejected_ids"}` (sequences of int, completions already cut) and what was lost.

    An example keeps the `p_chosen` of its row.

    dropped: (index into the rows, reason). truncated: the number of pairs that max_length cut. identical: the number of
    kept pairs whose completions have the same ids (a margin loss has no gradient there). warnings: sentences for the user.
    """

    examples: Sequence[Mapping] = dataclasses.field(default_factory=list)
    dropped: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    truncated: int = 0
    identical: int = 0
    warnings: list[str] = dataclasses.field(default_factory=list)
    clipped: int = 0  # rows whose prompt loses tokens at its end
    first_clipped: tuple[int, str] | None = None  # the first of them, and those tokens as text
    double_bos: int = 0

    def add(self, index: int, found: "Tokens") -> None:
        """Count the row `index`; its example goes to `examples`, a list."""
        if found.tail is not None:
            self.clipped += 1
            self.first_clipped = self.first_clipped or (index, found.tail)
        self.truncated += found.truncated
        self.identical += found.identical
        self.double_bos += found.double_bos
        if found.example is None:
            self.dropped.append((index, found.reason))
        else:
            self.examples.append(found.example)
