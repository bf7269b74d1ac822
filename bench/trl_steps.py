"""TRL's steps beside ours, tuned as its documentation advises: bf16 weights, precomputed reference, flash attention.

TRL's wheels have to travel with the checkout (README.md says how). Both train the same model on the same pairs per step,
ours first.
"""

import dataclasses
import importlib.util
import tempfile
from pathlib import Path

from bench.common import free
from bench.results import Results
from bench.steps import BATCHES, Case, build_model, cases, configs, groups, inside, measure, rates, timed
from bench.train import Stepper, trl_trainer


def beside(results: Results, dry: bool, top: dict) -> None:
    """Measure the first case of each model: ours once more, then TRL without and with recomputation."""
    for name in configs(dry):
        case = next(case for case in cases(dry) if case.model == name)
        measure(results, dry, top, [case], *((1, 1) if dry else ()))
        for checkpointing in (False, True):
            _trl(results, dataclasses.replace(case, checkpointing=checkpointing), dry, top)


def _trl(results: Results, case: Case, dry: bool, top: dict) -> None:
    shape = case.shape.replace(", float32 masters", "")  # TRL has none
    head = {"model": case.model, "shape": shape, "system": "TRL, tuned", **dataclasses.asdict(case)}
    if results.out_of_time:
        results.add(**head, skipped="out of time")
        return
    if importlib.util.find_spec("trl") is None:
        results.add(**head, skipped="trl is not installed: pip install trl==1.16.0, or see bench/README.md")
        return
    results.now(f"TRL's step of {case.model}, {case.shape}", "")
    with results.attempt(**head), tempfile.TemporaryDirectory() as folder:
        results.add(**head, **_step(results, case, Path(folder), dry, top))
    free(results.device)


def _step(results: Results, case: Case, folder: Path, dry: bool, top: dict) -> dict:
    config = configs(dry)[case.model]
    pairs = groups(case, config.vocab_size, dry=dry)
    size = min(map(len, pairs))  # TRL's collator takes batches of equal size
    rows = [
        {key: pair[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for g in pairs for pair in g[:size]
    ]
    model = build_model(config, case.bf16_weights, results.device)
    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    model.set_attn_implementation(attention)
    changes = {"gradient_checkpointing": case.checkpointing, "precompute_ref_log_probs": True}
    trainer = trl_trainer(folder, "trl", model, rows, size, results.device, "bfloat16", **changes)
    stepper = Stepper(trainer, results.device)
    tokens = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows) / BATCHES
    # The operations count the head on every row, and no padding, so TRL's share of the peak is an upper bound.
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    found = timed(results, stepper, *((1, 1) if dry else (3, 4)))
    return {"attention": attention, **rates(found, size, tokens, 6 * tokens * weights, results.device, top),
            **inside(results, stepper)}  # fmt: skip
