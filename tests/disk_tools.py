"""Random rows in files, and the examples that are made of them."""

import json

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

from tokenizer_tools import letters, text_row  # noqa: E402

from dpo_fast.data.tokenization import tokenize_pairs  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def quiet(_):
    pass


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def random_rows(n, seed=0):
    """Text of random letters; every third prompt is repeated, every fourth row long, every fifth has a p_chosen."""
    rng = np.random.default_rng(seed)

    def word():
        return "".join(rng.choice(list(LETTERS), rng.integers(1, 12)))

    rows = [text_row(word(), word(), word() * (8 if i % 4 == 0 else 1)) for i in range(n)]
    for i, row in enumerate(rows):
        row["prompt"] = rows[i // 3 * 3]["prompt"]
        row["chosen"] += str(i)  # never equal to the rejected one
        row |= {"p_chosen": i / n} if i % 5 == 0 else {}
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fields(example):
    return {k: x.tolist() if isinstance(x, np.ndarray) else x for k, x in example.items() if k != "index"}


def made_examples():
    """Of both truncation modes, so that some have another rejected prompt; one has no prompt."""
    rows = random_rows(40)
    made = [
        example
        for mode in ("keep_start", "keep_end")
        for example in tokenize_pairs(rows, letters(), max_length=20, truncation_mode=mode, log=quiet).examples
    ]
    assert any("rejected_prompt_ids" in example for example in made)
    return [*made, {"prompt_ids": [], "chosen_ids": [3, 4], "rejected_ids": [3, 5, 6]}]
