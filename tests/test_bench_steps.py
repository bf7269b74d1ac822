"""The training steps of bench.gpu: models at the size that they say, forests that are full, pairs as long as real ones."""

import json
import random
import re

import pytest
import torch
from bench_tools import rows_fixture, run_part  # noqa: F401 - the fixture `rows`

from bench import lengths, steps


def test_steps(tmp_path):
    found = run_part("steps", tmp_path)
    assert not [row for row in found if "failed" in row]
    assert {row["model"] for row in found} == {"llama tiny", "qwen2 tiny"}
    for option in ("checkpointing", "lora", "bf16_weights"):
        assert {row[option] for row in found} == {False, True}
    trunks = {row["trunk"]: row for row in found}
    assert set(trunks) == {"its own functions", "torch_compile", "Liger's kernels"}
    assert trunks["torch_compile"]["shape"].endswith("checkpointing off, torch_compile")
    found.remove(trunks["Liger's kernels"])
    assert re.search("pip install liger-kernel|need a GPU", trunks["Liger's kernels"]["skipped"])
    for row in found:
        assert row["tokens"] > row["forest_rows"] > row["live_rows"] / 2
        assert row["pairs_per_second"] == pytest.approx(row["pairs"] / row["seconds"])
        assert row["waits"] == 0
        assert 0 < len(row["dearest"]) <= 15


@pytest.mark.slow
def test_trl_steps(tmp_path):
    pytest.importorskip("trl")
    found = run_part("trl", tmp_path)
    assert not [row for row in found if "failed" in row]
    assert [row["system"] for row in found[:3]] == ["dpo_fast", "TRL, tuned", "TRL, tuned"]


def test_trl_that_is_not_there(rows, monkeypatch):
    from bench import trl_steps

    monkeypatch.setattr(trl_steps.importlib.util, "find_spec", lambda name: None)
    trl_steps._trl(rows, steps.cases(True)[0], True, {})
    assert "pip install trl" in rows.rows[0]["skipped"]


def test_lengths_by_hand():
    pairs = [
        {"prompt_ids": [1] * 9, "chosen_ids": [1, 2, 3], "rejected_ids": [1, 2]},
        {"prompt_ids": [1] * 14, "chosen_ids": [1, 5], "rejected_ids": [2, 5, 6]},
        {"prompt_ids": [1] * 3, "chosen_ids": [1], "rejected_ids": [2]},
    ]
    assert lengths.histogram(pairs) == [[2, 12, 2, 2, 1], [1, 3, 1, 1, 0]]


@pytest.mark.parametrize("name", ["oasst", "pandalm", "politeness", "stepwise"])
def test_drawn_pairs_are_as_long_as_real_ones(name):
    cells = json.loads(lengths.FILE.read_text())["histograms"][name]
    total = sum(cell[0] for cell in cells)
    pairs = lengths.draw(name, 5000, random.Random(0))
    drawn = [lengths.lengths(next(pairs)) for _ in range(300)]
    for k in range(4):
        mean = sum(cell[0] * cell[k + 1] for cell in cells) / total
        spread = (sum(cell[0] * (cell[k + 1] - mean) ** 2 for cell in cells) / total) ** 0.5
        # Four standard errors; the ids that follow a shared beginning may agree by chance, and one is always left.
        assert abs(sum(x[k] for x in drawn) / len(drawn) - mean) <= 4 * spread / 300**0.5 + 1


def test_forests_are_as_full_as_asked():
    from dpo_fast.forest.batch import ForestCollator

    case = steps.cases(False)[0]
    assert (case.model, case.rows, case.lora, case.checkpointing) == ("llama 1B", 8192, False, False)
    assert len(set(steps.cases(False))) == len(steps.cases(False)) == 48 + 8
    assert [case.trunk for case in steps.cases(False)[:3]] == ["its own functions", "torch_compile", "Liger's kernels"]
    for group in steps.groups(case, 128256):
        assert 0.8 * case.rows <= ForestCollator().part(group).forest.rows <= case.rows


def test_the_models_are_the_size_that_they_say():
    from transformers import AutoModelForCausalLM

    for name, config in steps.configs(False).items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        billions = {"llama 1B": 1.236, "qwen2 0.5B": 0.494}[name]
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=1e-3)
