"""Lengths of real pairs as histograms, which are small enough to ship where the data is not, and pairs drawn from them.

    python -m bench.lengths TOKENIZER ../shared/data        # counts again, writes bench/lengths.json

A cell of a histogram stands for all pairs whose prompt, chosen and rejected lengths lie between the same powers of two. It
holds their number, their mean lengths, and the mean length of the beginning that both completions share. A drawn pair has
the means of its cell and random ids: only lengths and what is shared decide the time of a step.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

from dpo_fast.forest.trie import common_prefix_length

FILE = Path(__file__).parent / "lengths.json"
COLUMNS = ("pairs", "prompt", "chosen", "rejected", "shared")


def lengths(pair: dict) -> tuple[int, int, int, int]:
    """The numbers of tokens of prompt, chosen and rejected, and of the beginning that both completions share."""
    chosen, rejected = pair["chosen_ids"], pair["rejected_ids"]
    return len(pair["prompt_ids"]), len(chosen), len(rejected), common_prefix_length(chosen, rejected)


def histogram(pairs: list[dict]) -> list[list[int]]:
    """The cells, the fullest first, with the entries of COLUMNS."""
    cells = defaultdict(list)
    for pair in pairs:
        found = lengths(pair)
        cells[tuple(n.bit_length() for n in found[:3])].append(found)
    rows = [
        [len(cell), *(round(sum(column) / len(cell)) for column in zip(*cell, strict=True))] for cell in cells.values()
    ]
    return sorted(rows, reverse=True)


def draw(name: str, vocabulary: int, rng: random.Random, divisor: int = 1):
    """Yield pairs of random ids without end, as long as those of the data set `name` (lengths are divided by `divisor`)."""
    cells = json.loads(FILE.read_text())["histograms"][name]

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(n)]

    while True:
        (cell,) = rng.choices(cells, [cell[0] for cell in cells])
        prompt, chosen, rejected, shared = (n // divisor for n in cell[1:])
        start = ids(shared)
        # At least one token of each side is not shared.
        sides = {
            f"{side}_ids": start + ids(max(n - shared, 1)) for side, n in (("chosen", chosen), ("rejected", rejected))
        }
        yield {"prompt_ids": ids(max(prompt, 1)), **sides, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("data", type=Path, help="a folder of data sets")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    from dpo_fast.data.sources import load_pairs
    from dpo_fast.data.tokenization import tokenize_pairs

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    found = {}
    for folder in sorted(path for path in args.data.iterdir() if path.is_dir()):
        rows = load_pairs(str(folder), split="train", log=lambda _: None).rows
        found[folder.name] = histogram(tokenize_pairs(rows, tokenizer, max_length=1024).examples)
        print(f"{folder.name}: {sum(cell[0] for cell in found[folder.name])} pairs, {len(found[folder.name])} cells")
    head = {"tokenizer": f"vocabulary {len(tokenizer)}", "max_length": 1024, "columns": COLUMNS}
    lines = ",\n".join(f'  "{name}": {json.dumps(cells)}' for name, cells in found.items())
    FILE.write_text(f'{json.dumps(head)[:-1]}, "histograms": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
