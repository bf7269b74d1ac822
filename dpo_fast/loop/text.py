"""Prompts become token ids as in training, and sampled token ids become text again."""

import torch
from jinja2 import TemplateError


def encode(prompt: str | list[dict], tokenizer) -> list[int]:
    """The ids of a prompt. Text gets the special tokens of the tokenizer, messages those of the chat template.

    Raises ValueError for messages without a chat template, and for a prompt without any token.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the prompts are messages and the tokenizer has no chat template: use a model with one (usually the "
                "name ends in -Instruct), or give the prompts as text"
            )
        try:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template refuses the prompt {shown(prompt)}: {error}") from None
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ValueError(f"the prompt {shown(prompt)} has no token: a completion needs one to follow")
    return ids


def shown(prompt: str | list[dict]) -> str:
    """The beginning of a prompt, for an error message."""
    text = prompt if isinstance(prompt, str) else prompt[-1].get("content") or ""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def eos_ids(model, tokenizer) -> list[int]:
    """The ids that end a completion: the tokenizer's, and those of the model's generation config (end of a turn)."""
    found = [tokenizer.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)]
    return sorted({i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])})


class Decoder:
    """Decodes a prompt's completions to text, which ends before the first stop string."""

    def __init__(self, prompt_ids: list[int], tokenizer, stop: tuple[str, ...], ends: list[int]):
        self.tokenizer, self.stop, self.ends, self.prompt_ids = tokenizer, stop, set(ends), prompt_ids
        self.before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
        # A character has at most four bytes and a token at least one. A few tokens more are needed, since a token may end
        # after the stop string.
        self.tail = 4 * max(map(len, stop), default=0) + 8

    def text(self, ids: list[int]) -> str:
        """The text after the prompt. It is decoded together with the prompt, since some tokenizers drop a leading space."""
        ids = ids[:-1] if ids and ids[-1] in self.ends else ids
        whole = self.tokenizer.decode(self.prompt_ids + ids, skip_special_tokens=True)
        text = whole[len(self.before) :] if whole.startswith(self.before) else self._decode(ids)
        return text[: min((at for at in map(text.find, self.stop) if at >= 0), default=None)]

    def stopped(self, ids: list[int]) -> bool:
        """Whether the last sampled ids hold a stop string."""
        return bool(self.stop) and any(stop in self._decode(ids[-self.tail :]) for stop in self.stop)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def pad_left(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, P], in which shorter rows are padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
