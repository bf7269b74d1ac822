"""The report of `--inspect_data`: what the trainer will see of the data, as text.

The batches and the forests that are counted are those of training.
"""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from ..forest.packing import PrefixForest
from .examples import Examples
from .sources import Pairs
from .tokens import TokenizedPairs

OPEN, CLOSE = "⟦", "⟧"
BAR = 40
BINS = 8
PLACES = 3
BATCHES = 1000  # batches that are counted at most


def report(
    pairs: Pairs,
    tokenized: TokenizedPairs,
    tokenizer,
    batches: Collection[list[list[Mapping]]],
    by_pairs: Collection[list[list[Mapping]]] | None = None,
) -> str:
    """Layouts, one decoded pair, lengths, what is lost, and tokens per pass with each way of batching.

    batches: the examples batch by batch in training's order, each batch as the groups that go through the model
        together; the first `BATCHES` are counted, one after the other. All lengths and sums are in tokens.
    by_pairs: where `batches` are filled to a budget of tokens, those of a number of pairs, to compare.
    Raises ValueError without examples.
    """
    if not tokenized.examples:
        raise ValueError("no tokenized pair to report on")
    counts, sizes = _counted(batches)
    which = "all batches of an epoch" if len(batches) <= BATCHES else f"the first {BATCHES} of {len(batches):,} batches"
    sections = [
        ("Layout", _layout(pairs, tokenized)),
        ("First pair", _first_pair(tokenized.examples[0], tokenizer)),
        ("Lengths (tokens)", _lengths(tokenized.examples)),
        ("Left out", _left_out(pairs, tokenized)),
        ("Warnings", "\n".join(tokenized.warnings) or "none"),
        (f"Tokens in {which} (of {max(sizes)} pairs, in training's order)", _savings(counts)),
    ]
    if by_pairs is not None:
        sections.append(("Tokens with tokens_per_step", _compared((counts, sizes), _counted(by_pairs))))
    return "\n\n".join(f"== {title}\n{body}" for title, body in sections)


def _layout(pairs: Pairs, tokenized: TokenizedPairs) -> str:
    lines = [f"{source}: {layout}" for source, layout in pairs.layout.items()]
    return "\n".join([*lines, f"{len(tokenized.examples)} pairs to train on"])


def _first_pair(example: dict, tokenizer) -> str:
    """Prompt and both completions; the scored tokens stand between the marks."""
    lines = []
    for side in ("chosen", "rejected"):
        ids, scored_ids = list(example.get(f"{side}_prompt_ids", example["prompt_ids"])), list(example[f"{side}_ids"])
        prompt, both = tokenizer.decode(ids), tokenizer.decode(ids + scored_ids)
        # A completion that is decoded alone may lose its first space.
        scored = both[len(prompt) :] if both.startswith(prompt) else tokenizer.decode(scored_ids)
        lines.append(f"-- {side} ({OPEN}scored{CLOSE})\n{prompt}{OPEN}{scored}{CLOSE}")
    return "\n".join(lines)


def _lengths(examples: Sequence[Mapping]) -> str:
    columns = Examples.of(examples)
    lengths = {side: columns.lengths(f"{side}_ids") for side in ("prompt", "chosen", "rejected")}
    parts = [f"{side}: {_histogram(values)}" for side, values in lengths.items()]
    total = {side: int(values.sum()) for side, values in lengths.items()}
    share = 2 * total["prompt"] / (2 * total["prompt"] + total["chosen"] + total["rejected"])
    return "\n".join([*parts, f"prompt tokens: {share:.1%} of all tokens (the prompt counts once for each completion)"])


def _histogram(values: np.ndarray) -> str:
    """Smallest, median and largest value, then one bar for each of up to BINS ranges of equal width."""
    ordered = np.sort(values)
    low, high = int(ordered[0]), int(ordered[-1])
    width = max(1, -(-(high - low + 1) // BINS))
    counts = np.bincount((ordered - low) // width).tolist()
    tallest = max(counts)
    lines = [f"min {low}, median {ordered[len(ordered) // 2]}, max {high}"]
    for i in range((high - low) // width + 1):
        start = low + i * width
        # Rounding up keeps the smallest count visible.
        bar = "#" * -(-counts[i] * BAR // tallest)
        lines.append(f"  {start:>6}-{start + width - 1:<6} {counts[i]:>7} {bar}".rstrip())
    return "\n".join(lines)


def _left_out(pairs: Pairs, tokenized: TokenizedPairs) -> str:
    places = defaultdict(list)
    for place, reason in [*pairs.dropped, *((f"row {index}", reason) for index, reason in tokenized.dropped)]:
        # The text after the colon differs from row to row.
        places[reason.split(": ")[0]].append(place)
    lines = []
    for reason, where in sorted(places.items(), key=lambda item: -len(item[1])):
        more = ", ..." if len(where) > PLACES else ""
        lines.append(f"{len(where)} dropped: {reason} ({', '.join(where[:PLACES])}{more})")
    return "\n".join(lines) or "no row dropped"


def _counted(batches: Iterable[list[list[Mapping]]]) -> tuple[dict[str, int], list[int]]:
    """`count_tokens` of the first batches, and the pairs of each of them."""
    sizes: list[int] = []

    def measured():
        for batch in itertools.islice(batches, BATCHES):
            sizes.append(sum(map(len, batch)))
            yield batch

    return count_tokens(measured()), sizes


def _savings(counts: dict[str, int]) -> str:
    padded, packed = counts["padded"], counts["packed"]
    lines = [f"{'padded':<16} {padded:>12,}", f"{'packed':<16} {packed:>12,}  {padded / packed:.2f}x fewer than padded"]
    for name in ("prompt shared", "prefix shared"):
        n = counts[name]
        saved = f"{padded / n:.2f}x fewer than padded, {packed / n:.2f}x fewer than packed"
        lines.append(f"{name:<16} {n:>12,}  {saved} (perf/tokens_saved {1 - n / packed:.1%})")
    return "\n".join(lines)


def _compared(by_tokens, by_pairs) -> str:
    """Of what `_counted` found: tokens per pair that the trunk computes, with the budget and without."""
    lines, found = [], []
    for name, (counts, sizes) in (("with", by_tokens), ("without", by_pairs)):
        found.append(counts["prefix shared"] / sum(sizes))
        lines.append(f"{name:<8} {found[-1]:>10.1f} per pair, {min(sizes)} to {max(sizes)} pairs in a batch")
    return "\n".join([*lines, f"{1 - found[0] / found[1]:.1%} of the tokens saved"])


def count_tokens(batches: Iterable[list[list[Mapping]]]) -> dict[str, int]:
    """Tokens of all batches: padded to the longest of a batch, packed one after the other, and as the trunk computes
    them with `share="prompt"` and `share="prefix"` (the last token of a sequence predicts nothing and is left out)."""
    counts = dict.fromkeys(("padded", "packed", "prompt shared", "prefix shared"), 0)
    for groups in batches:
        examples = [example for group in groups for example in group]
        prompts = {"chosen_ids": "prompt_ids", "rejected_ids": "rejected_prompt_ids"}
        lengths = [
            len(e.get(prompt, e["prompt_ids"])) + len(e[side]) for e in examples for side, prompt in prompts.items()
        ]
        counts["padded"] += len(lengths) * max(lengths)
        counts["packed"] += sum(lengths)
        for group in groups:
            for share in ("prompt", "prefix"):
                counts[f"{share} shared"] += PrefixForest.from_pairs(group, share=share).rows
    return counts
