"""A candidates file for the tests of labels, and the store of one."""

import json

import pytest

from dpo_fast.loop.store import LabelStore


def candidates(path, prompts=4, completions=2, **changes):
    """A candidates file of `prompts` lines."""
    rows = [
        {
            "id": f"p{i}", "prompt": f"question {i}", "split": "train", "round": 0, "model": "m",
            "completions": [{"text": f"answer {i} {j}", "tokens": 3, "logp": -1.0} for j in range(completions)],
        } | changes
        for i in range(prompts)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def store_of(annotators=(), **shape):
    """A fixture: an open store of a candidates file of this `shape`, with annotators of these names."""

    @pytest.fixture
    def store(tmp_path):
        with LabelStore(tmp_path / "l.sqlite", candidates(tmp_path / "c.jsonl", **shape)) as made:
            for name in annotators:
                made.add_annotator(name)
            yield made

    return store
