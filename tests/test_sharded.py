"""FSDP2 on gloo processes beside what one process computes: the reference pass, adapters, bf16, and other numbers of ranks."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import tiny
from test_distributed import FSDP, same, spec, start
from test_resume import history

from dpo_fast.training.ref_cache import _RECORD
from dpo_fast.training.sharding import passes_together

pytestmark = pytest.mark.slow
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": True, "lora_dropout": 0.0}
LAYERS = 16  # so that a few of them are a small part of the whole
SHARDED = {**FSDP, "gradient_checkpointing": False}


SPLIT = {"max_tokens_per_batch": 60, "precompute_ref_batch_size": 3, "evaluate_first": True}
LORAS = {"lora": LORA, "ref_cache_dir": None}
OTHERS = {"train": tiny.pairs(18)}  # three steps of six pairs in each epoch
SAVED = {**OTHERS, **SHARDED, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process computes, and two with shards; the run whose memory is weighed is the first of its processes."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny.llama(num_hidden_layers=LAYERS).save_pretrained(folder / "model")
    halves = {"max_tokens_per_batch": 60, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    start(
        1,
        spec(folder, "one", 1, ref_cache_dir=str(folder / "ref_one"), **SPLIT),
        spec(folder, "lora_one", 1, **LORAS),
        spec(folder, "three_whole", 1, per_device_train_batch_size=6, **OTHERS),
        spec(folder, "float32_one", 1, dtype="float32"),
    )
    start(
        2,
        spec(folder, "two", 2, ref_cache_dir=str(folder / "ref_two"), measure=True, **SHARDED, **SPLIT),
        spec(folder, "lora_two", 2, **{**SHARDED, "gradient_checkpointing": True}, **LORAS, **halves),
        spec(folder, "three", 2, per_device_train_batch_size=3, **SAVED),
    )
    return folder


def cached(folder) -> dict:
    """All values of the one cache in `folder`, by key."""
    (path,) = folder.glob("ref-*.bin")
    records = np.frombuffer(path.read_bytes(), _RECORD)
    return {record["key"].tobytes(): record["values"].tolist() for record in records}


def test_the_reference_pass_goes_through_the_shards(folder):
    """The same log-probs as one process; no rank holds the whole model meanwhile; and an evaluation may come first."""
    want, got = cached(folder / "ref_one"), cached(folder / "ref_two")
    assert len(want) == 23
    assert got.keys() == want.keys()
    for key, values in want.items():
        assert got[key] == pytest.approx(values, rel=1e-12)
    found, whole = (json.loads((folder / name).read_text()) for name in ("two", "one"))
    memory = found["memory"]
    assert len(memory["reference"]) >= LAYERS
    assert max(memory["reference"]) < 0.85 * memory["weights"]
    assert found["before"]["eval_loss"] == pytest.approx(whole["before"]["eval_loss"], rel=1e-9)
    same(folder, "two", "one")


def test_adapters_accumulated_and_split(folder):
    same(folder, "lora_two", "lora_one")


def test_a_run_goes_on_with_another_number_of_processes(folder):
    resume = {"resume": str(folder / "three_run/checkpoint-2"), **SAVED}
    start(3, spec(folder, "three", 3, per_device_train_batch_size=2, **resume))
    same(folder, "three", "three_whole")


def test_bf16_starts_at_the_reference_and_follows_float32(folder):
    """Log-probs are not rounded to bf16 on their way out of the sharded model, nor gradients while they are reduced."""
    bf16 = {"bf16": True, "dtype": "float32", **SHARDED}
    start(2, spec(folder, "bf16_two", 2, **bf16), spec(folder, "bf16_lora", 2, **bf16, **LORAS))
    exact, full, lora = (
        [row for row in history(folder, name) if "loss" in row] for name in ("float32_one", "bf16_two", "bf16_lora")
    )
    assert lora[0]["rewards/margins"] == pytest.approx(0, abs=1e-9)
    assert full[0]["rewards/margins"] == pytest.approx(0, abs=5e-3)
    assert lora[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.01)
    for got, want in zip(full, exact, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=0.05)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=0.1)
    got, want = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("bf16_two", "float32_one"))
    begin = dict(tiny.llama(num_hidden_layers=LAYERS, dtype=torch.float32).named_parameters())
    moved = [torch.cat([(w[key] - begin[key]).flatten() for key in begin]) for w in (got, want)]
    assert torch.cosine_similarity(*moved, dim=0) > 0.9


def test_ranks_with_fewer_parts_run_along():
    class Ranks:
        device = "cpu"

        def __init__(self, others):
            self.others = others

        def gather(self, count):
            return torch.cat([count, torch.tensor([self.others])])

    assert list(passes_together(Ranks(3), ["a"], "idle")) == [("a", True), ("idle", False), ("idle", False)]
    assert list(passes_together(Ranks(1), ["a", "b"], "idle")) == [("a", True), ("b", True)]
    assert list(passes_together(Ranks(0), [], "idle")) == []
