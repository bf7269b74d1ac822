"""What the trainer will see of the data, as text: the report of `--inspect_data`.

It counts tokens on its own (nothing of packing.py), so that it also checks what packing claims to save.
"""

from collections import Counter, defaultdict
from itertools import pairwise

from ..forest.packing import common_prefix_length
from .sources import Pairs
from .tokenization import TokenizedPairs

OPEN, CLOSE = "⟦", "⟧"
BAR = 40
BINS = 8
PLACES = 3


def report(pairs: Pairs, tokenized: TokenizedPairs, tokenizer, *, batch_size: int = 8) -> str:
    """Layouts, one decoded pair, lengths, what is lost, and tokens a pass with each way of batching.

    batch_size: pairs a batch, in the order of the examples. All lengths and sums are in tokens.
    Raises ValueError without examples or for a batch size below 1.
    """
    if not tokenized.examples:
        raise ValueError("no tokenized pair to report on")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    sections = [
        ("Layout", _layout(pairs, tokenized)),
        ("First pair", _first_pair(tokenized.examples[0], tokenizer)),
        ("Lengths (tokens)", _lengths(tokenized.examples)),
        ("Left out", _left_out(pairs, tokenized)),
        ("Warnings", "\n".join(tokenized.warnings) or "none"),
        (f"Tokens in one epoch, batches of {batch_size} pairs as they come", _savings(tokenized.examples, batch_size)),
    ]
    return "\n\n".join(f"== {title}\n{body}" for title, body in sections)


def _layout(pairs: Pairs, tokenized: TokenizedPairs) -> str:
    lines = [f"{source}: {layout}" for source, layout in pairs.layout.items()]
    return "\n".join([*lines, f"{len(tokenized.examples)} pairs to train on"])


def _first_pair(example: dict, tokenizer) -> str:
    """Prompt and both completions; the scored tokens stand between the marks."""
    lines = []
    for side in ("chosen", "rejected"):
        ids = example.get(f"{side}_prompt_ids", example["prompt_ids"])
        prompt, both = tokenizer.decode(ids), tokenizer.decode(ids + example[f"{side}_ids"])
        # Decoded on its own, a completion may lose its first space.
        scored = both[len(prompt) :] if both.startswith(prompt) else tokenizer.decode(example[f"{side}_ids"])
        lines.append(f"-- {side} ({OPEN}scored{CLOSE})\n{prompt}{OPEN}{scored}{CLOSE}")
    return "\n".join(lines)


def _lengths(examples: list[dict]) -> str:
    lengths = {side: [len(e[f"{side}_ids"]) for e in examples] for side in ("prompt", "chosen", "rejected")}
    parts = [f"{side}: {_histogram(values)}" for side, values in lengths.items()]
    total = {side: sum(values) for side, values in lengths.items()}
    share = 2 * total["prompt"] / (2 * total["prompt"] + total["chosen"] + total["rejected"])
    return "\n".join([*parts, f"prompt tokens: {share:.1%} of all tokens (the prompt counts once for each completion)"])


def _histogram(values: list[int]) -> str:
    """Smallest, median and largest value, then one bar for each of up to BINS ranges of equal width."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    width = max(1, -(-(high - low + 1) // BINS))
    counts = Counter((value - low) // width for value in values)
    tallest = max(counts.values())
    lines = [f"min {low}, median {ordered[len(ordered) // 2]}, max {high}"]
    for i in range((high - low) // width + 1):
        start = low + i * width
        # The smallest count still shows.
        bar = "#" * -(-counts[i] * BAR // tallest)
        lines.append(f"  {start:>6}-{start + width - 1:<6} {counts[i]:>7} {bar}".rstrip())
    return "\n".join(lines)


def _left_out(pairs: Pairs, tokenized: TokenizedPairs) -> str:
    places = defaultdict(list)
    for place, reason in [*pairs.dropped, *((f"row {index}", reason) for index, reason in tokenized.dropped)]:
        # What follows the colon differs from row to row.
        places[reason.split(": ")[0]].append(place)
    lines = []
    for reason, where in sorted(places.items(), key=lambda item: -len(item[1])):
        more = ", ..." if len(where) > PLACES else ""
        lines.append(f"{len(where)} dropped: {reason} ({', '.join(where[:PLACES])}{more})")
    return "\n".join(lines) or "no row dropped"


def _savings(examples: list[dict], batch_size: int) -> str:
    counts = count_tokens(examples, batch_size)
    padded = counts["padded"]
    return "\n".join(f"{name:<16} {n:>12,}  {padded / n:.2f}x fewer than padded" for name, n in counts.items())


def count_tokens(examples: list[dict], batch_size: int) -> dict[str, int]:
    """Tokens that the model computes over all batches: padded to the longest, packed, prompts once, prefixes once.

    Equal prompts of a batch count once in the last two; in the last, so does every prefix that completions of one
    prompt have in common.
    """
    counts = Counter({"padded": 0, "packed": 0, "prompt shared": 0, "prefix shared": 0})
    for start in range(0, len(examples), batch_size):
        completions = defaultdict(list)  # of each distinct prompt
        for example in examples[start : start + batch_size]:
            completions[tuple(example["prompt_ids"])].append(example["chosen_ids"])
            other = example.get("rejected_prompt_ids", example["prompt_ids"])
            completions[tuple(other)].append(example["rejected_ids"])
        lengths = [len(prompt) + len(ids) for prompt, group in completions.items() for ids in group]
        counts["padded"] += len(lengths) * max(lengths)
        counts["packed"] += sum(lengths)
        for prompt, group in completions.items():
            once = len(prompt) + sum(map(len, group))
            # In sorted order, the prefix shared with the sequence before is all that is shared with any earlier one.
            group = sorted(group)
            repeated = sum(common_prefix_length(a, b) for a, b in pairwise(group))
            counts["prompt shared"] += once
            counts["prefix shared"] += once - repeated
    return dict(counts)
