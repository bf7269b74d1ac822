"""The measures of a round: win rates in both orders, and statistics of samples that show drift (KL, entropy, length, ...)."""

import math
from collections.abc import Sequence

import torch

from ..data.tokenization import tokenize_pairs
from ..forest.batch import ForestCollator
from ..forest.model import evaluating, prepare_model
from .items import Item
from .judges import Judge, reply
from .scoring import MAX_TOKENS

_Z = 1.959964  # the normal quantile of a two-sided confidence of 95 %
_CREDIT = {"a": 1.0, "b": 0.0}  # any other choice is half a win


def win_rate(judge: Judge, ours: Sequence[dict], theirs: Sequence[dict]) -> dict[str, float]:
    """How often the judge, asked in both orders, prefers our sample of a prompt; a tie is half a win.

    `ours` and `theirs` are lines of candidates files of the same prompts; the first completion of each counts. Returns
    `rate`, the bounds `low` and `high` of its 95 % confidence interval, and `prompts`. The interval is Wilson's (1927) over
    prompts: the two orders of a prompt are one observation, so that it is not too narrow.
    """
    other = {row["id"]: row for row in theirs}
    items, scores = [], {}
    for row in ours:
        a, b = row["completions"][0]["text"], other[row["id"]]["completions"][0]["text"]
        scores[row["id"]] = [0.5, 0.5] if a == b else []
        if a != b:
            items.append(Item(f"{row['id']}:0", row["id"], row["prompt"], a, b, "heldout"))
            items.append(Item(f"{row['id']}:1", row["id"], row["prompt"], b, a, "heldout"))
    for item, choice, _ in judge(items):
        credit = _CREDIT.get(choice, 0.5)
        scores[item.prompt_id].append(1 - credit if item.id.endswith(":1") else credit)
    rate = sum(sum(pair) / 2 for pair in scores.values()) / len(scores)
    return {"rate": rate, **wilson(rate, len(scores)), "prompts": len(scores)}


def wilson(rate: float, n: int) -> dict[str, float]:
    """`low` and `high` of a share's 95 % confidence interval over n observations (Wilson 1927)."""
    centre, spread = rate + _Z**2 / (2 * n), _Z * math.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n * n))
    scale = 1 + _Z**2 / n
    return {"low": max(0.0, (centre - spread) / scale), "high": min(1.0, (centre + spread) / scale)}


def sample_examples(rows: Sequence[dict], tokenizer) -> list[dict]:
    """Token ids of the first completion of each line, as a pair with equal sides (the forest computes them once)."""
    texts = [(row["prompt"], row["completions"][0]) for row in rows]
    pairs = [dict(prompt=p, **dict.fromkeys(("chosen", "rejected"), reply(p, c["text"]))) for p, c in texts]
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=None, skip_bad_rows=True, log=lambda _: None)
    dropped = {index for index, _ in tokenized.dropped}
    kept = [c for i, (_, c) in enumerate(texts) if i not in dropped]
    for example, completion in zip(tokenized.examples, kept, strict=True):
        if completion["truncated"] and len(example["chosen_ids"]) > 1:
            # The sample did not end, so the end-of-sequence token is no part of it.
            for side in ("chosen_ids", "rejected_ids"):
                example[side] = example[side][:-1]
    return tokenized.examples


def sequence_statistics(model: torch.nn.Module, examples: Sequence[dict]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Log-prob [B] and summed entropy [B] in nats of each `chosen_ids` under the model (float64), and the number of tokens."""
    plan, device, tokens = prepare_model(model), next(model.parameters()).device, 0
    collator = ForestCollator(share="prefix" if plan.share else "none", max_tokens=MAX_TOKENS)
    logps, entropies = [], []
    with evaluating(model):
        for group in collator.split(examples):
            forest = collator.part(group).forest.to(device)
            out = model(forest=forest, outputs=("entropy",))
            for found, name in ((logps, "token_logps"), (entropies, "entropy")):
                found.append(forest.sum_paths(out[name].double())[0].cpu())  # [2, B] with equal sides
            tokens += int(forest.lengths[: len(group)].sum())
    return torch.cat(logps), torch.cat(entropies), tokens


def text_statistics(rows: Sequence[dict]) -> dict[str, float]:
    """Means of `length` (tokens), `truncated`, `empty` (shares) and `repetition` (share of word 4-grams that came before)."""
    samples = [row["completions"][0] for row in rows]
    return {
        "length": sum(c["tokens"] for c in samples) / len(samples),
        "truncated": sum(c["truncated"] for c in samples) / len(samples),
        "empty": sum(c["empty"] for c in samples) / len(samples),
        "repetition": sum(_repeated(c["text"]) for c in samples) / len(samples),
    }


def _repeated(text: str) -> float:
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
