"""A head whose vocabulary is cut over two and four processes is the whole head, in float64 and float32."""

from pathlib import Path

import forked
import pytest
import tiny
import transformers

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_together_are_the_whole_head(tmp_path, processes):
    tiny.llama().save_pretrained(tmp_path)
    # The mesh of transformers 5.17 has no name for its dimension, so the op cannot know which ranks share rows, and refuses.
    named = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
    arguments = [tmp_path] if processes == 2 and named else []
    forked.run_ranks(processes, ROOT / "tests/run_vocab_parallel.py", *arguments)
