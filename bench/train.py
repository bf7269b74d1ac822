"""Whole training steps side by side in one process: dpo_fast shared and unshared, TRL with its defaults and tuned.

    python -m bench.train                        # every task that can run here
    python -m bench.train --task synthetic --repeats 5

Tasks (on a CPU in float32 and, with --dtype bfloat16, in bf16 compute; on a CUDA device in bf16):
    synthetic   12 layers x 576, vocabulary 32,000; 2 pairs of a 384-token prompt and 128-token completions
    oasst       a real model (--model, default ../smollm2) on real pairs (--data, default ../shared/data/oasst), 4 pairs
                per step in the given order

A row is (system, seconds per step, pairs per second, ratio to TRL's defaults). Systems take turns, one step each, `repeats`
times or until the next turn would pass `--minutes` (at least once), after a step of one pair to warm up; the median is
reported. The precomputation of the reference is timed too and stated beside the steps (a run pays for it once per pair).
One JSON file with everything goes to bench/results/.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.common import ROOT, conditions


def synthetic(folder: Path) -> tuple[str, list[dict]]:
    """Model folder and token pairs of the first task: random weights, and random ids without an end-of-sequence token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=576, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rng = random.Random(0)

    def ids(n):
        return [rng.randrange(3, 32000) for _ in range(n)]

    rows = [{"prompt_ids": ids(384), "chosen_ids": ids(128), "rejected_ids": ids(128)} for _ in range(40)]
    return str(folder / "model"), rows


def real_pairs(model: str, data: str) -> tuple[str, list[dict]]:
    """The first pairs of a data folder, tokenised once, so that every system gets the same ids."""
    from transformers import AutoTokenizer

    from dpo_fast.data.sources import load_pairs
    from dpo_fast.data.tokenization import tokenize_pairs

    rows = load_pairs(data, split="train", log=lambda _: None).rows[:160]
    return model, tokenize_pairs(rows, AutoTokenizer.from_pretrained(model), max_length=1024).examples


def options(folder: Path, name: str, batch: int, device: str, dtype: str) -> dict:
    return {
        "output_dir": str(folder / name), "report_to": "none", "per_device_train_batch_size": batch, "disable_tqdm": True,
        "use_cpu": device == "cpu", "bf16": dtype == "bfloat16", "logging_strategy": "no", "save_strategy": "no",
        "num_train_epochs": 1, "learning_rate": 1e-6,
    }  # fmt: skip


def dpo_fast_trainer(folder, name, model, rows, batch, device, dtype, **changes):
    from dpo_fast import DPOConfig, DPOTrainer

    args = DPOConfig(
        **options(folder, name, batch, device, dtype), ref_cache_dir=str(folder / name / "ref"), verify=False, **changes
    )
    start = time.perf_counter()
    trainer = DPOTrainer(model, args=args, train_dataset=rows)
    trainer.reference_seconds = time.perf_counter() - start
    trainer.batches = [
        trainer.data_collator([trainer.train_dataset[j] for j in range(i, i + batch)])
        for i in range(0, len(rows) - batch + 1, batch)
    ]
    return trainer


def trl_trainer(folder, name, model, rows, batch, device, dtype, **changes):
    import datasets
    import trl
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # TRL gets the finished ids, since its own preparation would need text. Everything after that is TRL's.
    class Ready(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    args = trl.DPOConfig(**options(folder, name, batch, device, dtype), **changes)
    start = time.perf_counter()
    trainer = Ready(model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    trainer.reference_seconds = time.perf_counter() - start
    data = trainer.train_dataset
    trainer.batches = [
        trainer.data_collator([data[j] for j in range(i, i + batch)]) for i in range(0, len(rows) - batch + 1, batch)
    ]
    return trainer


def systems(device: str, task: str) -> dict:
    """Name -> (maker, changes); `tuned` follows TRL's documentation where memory allows it."""
    # Without checkpointing the padded activations of the real model do not fit 24 GB.
    tuned = {"gradient_checkpointing": device == "cpu" and task == "oasst", "precompute_ref_log_probs": True}
    if device == "cuda":
        tuned["model_init_kwargs"] = {"dtype": "bfloat16", "attn_implementation": "flash_attention_2"}
    ours = {"model_init_kwargs": {"dtype": "bfloat16"}} if device == "cuda" else {}
    return {
        "dpo_fast": (dpo_fast_trainer, ours),  # its defaults
        "dpo_fast, unshared": (dpo_fast_trainer, {**ours, "share": "none"}),
        "dpo_fast, checkpointing": (dpo_fast_trainer, {**ours, "gradient_checkpointing": True}),
        "dpo_fast, compiled": (dpo_fast_trainer, {**ours, "torch_compile": True}),
        "TRL, defaults": (trl_trainer, {}),
        "TRL, tuned": (trl_trainer, tuned),
    }


class Stepper:
    """Takes one optimizer step at a time, by the trainer's own training_step, clipping and optimizer."""

    def __init__(self, trainer, device: str):
        self.trainer, self.device, self.next = trainer, device, 0
        trainer.create_optimizer_and_scheduler(1000)
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.current_gradient_accumulation_steps = 1

    def warm_up(self) -> None:
        """Take a step of one pair."""
        data = self.trainer.train_dataset
        self.step(self.trainer.data_collator([data[0]]))

    def step(self, batch=None) -> torch.Tensor:
        """Take the next step, or that of `batch`, without waiting for the device; returns its loss."""
        trainer = self.trainer
        if batch is None:
            batch = trainer.batches[self.next % len(trainer.batches)]
            self.next += 1
        loss = trainer.training_step(trainer.model, trainer._prepare_inputs(batch))
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
        return loss

    def __call__(self) -> tuple[float, float]:
        """Take the next step; returns its seconds and its loss."""
        self.synchronize()
        start = time.perf_counter()
        loss = self.step()
        self.synchronize()
        return time.perf_counter() - start, float(loss)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(task: str, args, device: str, folder: Path, end: float) -> list[dict]:
    batch = {"synthetic": 2, "oasst": 4}[task]
    model, rows = synthetic(folder) if task == "synthetic" else real_pairs(args.model, args.data)
    rows = rows[: batch * args.repeats]
    steppers, failed, start = {}, {}, {}
    for name, (make, changes) in systems(device, task).items():
        if args.systems and name not in args.systems:
            continue
        try:
            trainer = make(folder, name.replace(", ", "_"), model, rows, batch, device, args.dtype, **changes)
            steppers[name], start[name] = Stepper(trainer, device), trainer.reference_seconds
        except ImportError as error:
            failed[name] = f"{error} (pip install trl==1.16.0)"
            continue
        steppers[name].warm_up()
    times = {name: [] for name in steppers}
    losses = {name: [] for name in steppers}
    for turn in range(args.repeats):
        began = time.monotonic()
        for name, step in steppers.items():
            seconds, loss = step()
            losses[name].append(loss)
            times[name].append(seconds)
            print(f"  {task} turn {turn + 1} {name}: {seconds:.2f} s, loss {loss:.5f}", file=sys.stderr)
        gc.collect()
        if time.monotonic() + (time.monotonic() - began) > end:
            break
    base = statistics.median(times.get("TRL, defaults") or [float("nan")])
    out = [{"task": task, "system": name, "skipped": why} for name, why in failed.items()]
    for name, seconds in times.items():
        median = statistics.median(seconds)
        out.append(
            {
                "task": task, "system": name, "batch": batch, "seconds_per_step": median, "all_seconds": seconds,
                "pairs_per_second": batch / median, "times_trl_defaults": base / median, "losses": losses[name],
                "set_up_seconds": start[name], "checkpointing": steppers[name].trainer.args.gradient_checkpointing,
            }
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["synthetic", "oasst"], choices=["synthetic", "oasst"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=7, help="no turn is begun that would end later")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--systems", nargs="+", help="only these")
    parser.add_argument("--model", default=str(ROOT.parent / "smollm2"))
    parser.add_argument("--data", default=str(ROOT.parent / "shared/data/oasst"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    rows, end = [], time.monotonic() + 60 * args.minutes
    for task in args.task:
        if task == "oasst" and not (Path(args.model).exists() and Path(args.data).exists()):
            rows.append({"task": task, "skipped": f"{args.model} or {args.data} is not there"})
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(task, args, device, Path(folder), end)
    result = {**conditions(device, "bench.train"), "dtype": args.dtype, "rows": rows}
    path = ROOT / "bench/results" / f"train_{device}_{args.dtype}_{'_'.join(args.task)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['device']}, {args.dtype}, {result['versions']}, {result['commit']}, {result['date']}")
    for row in rows:
        if "skipped" in row:
            print(f"{row['task']:10} {row.get('system', ''):20} skipped: {row['skipped']}")
        else:
            print(
                f"{row['task']:10} {row['system']:20} {row['seconds_per_step']:8.2f} s/step "
                f"{row['pairs_per_second']:7.3f} pairs/s {row['times_trl_defaults']:6.2f}x TRL's defaults"
            )
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
