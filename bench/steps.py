"""Whole training steps at sizes that people train, on forests of a given size, with random weights and real lengths.

A step is the trainer's own: forward and backward over one forest, clipping, optimizer. Pairs are drawn from the lengths
of real pairs (lengths.py) until a forest has about as many rows as asked. Steps follow each other without waiting, as in a
run; the time of a step is that of several steps over their number. MFU is operations without recomputation over the peak
of the vendor's data sheet; the share of the GEMM ceiling of the same process is given beside it.
"""

import copy
import dataclasses
import importlib.util
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench.common import free, reason
from bench.lengths import draw
from bench.profiling import kernels, waits
from bench.results import Results
from bench.train import Stepper, options

BATCHES = 3  # forests that take turns
COMPILED, LIGER = "torch_compile", "Liger's kernels"
DATA = "oasst"


@dataclasses.dataclass(frozen=True)
class Case:
    """The model of one row of results, and how it is trained."""

    model: str
    rows: int  # approximate rows of a forest
    checkpointing: bool
    lora: bool
    bf16_weights: bool  # bf16 weights with float32 masters; otherwise float32 weights and bf16 compute
    trunk: str = "its own functions"  # or torch_compile, or Liger's kernels: what norms, rotary positions and MLPs are

    @property
    def shape(self) -> str:
        return ", ".join(
            [
                f"{self.rows} rows",
                "LoRA" if self.lora else "full",
                "bf16 weights, float32 masters" if self.bf16_weights else "float32 weights, bf16 compute",
                f"checkpointing {'on' if self.checkpointing else 'off'}",
                *([] if self.trunk == Case.trunk else [self.trunk]),
            ]
        )


def configs(dry: bool) -> dict:
    """The shapes of Llama 3.2 1B and Qwen2 0.5B; for a dry run, two tiny ones."""
    from transformers import LlamaConfig, Qwen2Config

    common = {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if dry:
        tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        tiny |= {"num_key_value_heads": 1, "vocab_size": 300, **common}
        return {"llama tiny": LlamaConfig(**tiny), "qwen2 tiny": Qwen2Config(**tiny)}
    return {
        "llama 1B": LlamaConfig(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, **common,
        ),
        "qwen2 0.5B": Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, max_position_embeddings=32768, **common,
        ),
    }  # fmt: skip


def cases(dry: bool) -> list[Case]:
    """All combinations; those that differ least from 8k rows of full training without recomputation come first.

    What may become the default of the trunk is measured for each model and with recomputation.
    """
    models, rows = list(configs(dry)), ([64] if dry else [8192, 2048, 16384])
    on_off = (False, True)
    plain = [Case(*case) for case in itertools.product(models, rows, on_off, on_off, (True, False))]
    first = plain[0]
    others = itertools.product((COMPILED, LIGER), models, on_off)
    found = [dataclasses.replace(first, trunk=t, model=m, checkpointing=c) for t, m, c in others] + plain

    def changes(case: Case) -> int:
        return sum(getattr(case, f.name) != getattr(first, f.name) for f in dataclasses.fields(Case))

    found = sorted(found, key=changes)
    return [case for case in found if changes(case) <= 1] if dry else found


def groups(case: Case, vocabulary: int, count: int = BATCHES, dry: bool = False) -> list[list[dict]]:
    """`count` groups of pairs, each a forest of at most `case.rows` rows (or of one pair where no pair fits)."""
    from dpo_fast.forest.packing import pair_tokens

    pairs = draw(DATA, vocabulary, random.Random(0), divisor=32 if dry else 1)
    out, pair = [], next(pairs)
    for _ in range(count):
        group, room = [], case.rows
        while not group or pair_tokens(pair, "prefix") <= room:
            room -= pair_tokens(pair, "prefix")
            group.append(pair)
            pair = next(pairs)
        out.append(group)
    return out


def build_model(config, bf16_weights: bool, device: str):
    """A model with random weights, made on the device. It gets a config of its own, since it writes into it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.bfloat16 if bf16_weights else torch.float32
        )


def dpo_fast_trainer(case: Case, config, device: str, folder: Path, pairs: list[list[dict]]):
    from transformers.integrations.liger import apply_liger_kernel

    from dpo_fast import DPOConfig, DPOTrainer
    from dpo_fast.data.pairs import PairDataset

    peft_config = None
    if case.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    backend = {"cuda": "inductor", "cpu": "eager"}[device]  # a dry run does not wait for machine code
    compiled = {"torch_compile": True, "torch_compile_backend": backend} if case.trunk == COMPILED else {}
    args = DPOConfig(
        **options(folder, "run", 1, device, "bfloat16"), gradient_checkpointing=case.checkpointing, verify=False,
        use_liger_kernel=case.trunk == LIGER, **compiled,
    )  # fmt: skip
    examples = [pair for group in pairs for pair in group]
    model = build_model(config, case.bf16_weights, device)
    trainer = DPOTrainer(model, args=args, train_dataset=PairDataset(examples), peft_config=peft_config)
    if args.use_liger_kernel:  # `train` would do it
        apply_liger_kernel(trainer.model, args.liger_kernel_config)
    trainer._started = True  # the drawn log-probs are no reference's, so the first step has nothing to compare
    trainer.batches = [trainer.data_collator(group) for group in pairs]
    return trainer


def measure(results: Results, dry: bool, top: dict, cases: list[Case], repeats: int = 3, steps: int = 4) -> None:
    """Add one row for each case: first the time of steps, then memory, waits and kernels of one more step each."""
    known = configs(dry)
    for case in cases:
        head = {"model": case.model, "shape": case.shape, "system": "dpo_fast", **dataclasses.asdict(case)}
        if results.out_of_time:
            results.add(**head, skipped="out of time")
            continue
        if case.trunk == LIGER and (why := without_liger(results.device)):
            results.add(**head, skipped=why)
            continue
        results.now(f"step of {case.model}, {case.shape}", "")
        with results.attempt(**head), tempfile.TemporaryDirectory() as folder:
            row = _measure(results, case, known[case.model], Path(folder), dry, top, repeats, steps)
            results.add(**head, **row)
        free(results.device)


def without_liger(device: str) -> str | None:
    """Why Liger's kernels cannot run, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed: pip install liger-kernel, or see bench/README.md"
    return None if device == "cuda" else "Liger's kernels need a GPU"


def _measure(results: Results, case: Case, config, folder: Path, dry: bool, top: dict, repeats, steps) -> dict:
    pairs = groups(case, config.vocab_size, dry=dry)
    trainer = dpo_fast_trainer(case, config, results.device, folder, pairs)
    parts = [part for batch in trainer.batches for part in batch["parts"]]
    forests = [part.forest for part in parts]
    flops = sum(trainer.setup.flops(f.rows, f.targets.numel(), f.grad_items) for f in forests) / BATCHES
    stepper = Stepper(trainer, results.device)
    found = timed(results, stepper, repeats, steps)
    tokens, rows = (sum(x) / BATCHES for x in ([f.num_tokens for f in forests], [f.rows for f in forests]))
    return {
        "reference": trainer.setup.reference, **rates(found, sum(map(len, pairs)) / BATCHES, tokens, flops, results.device, top),
        "forest_rows": rows, "live_rows": sum(f.targets.numel() for f in forests) / BATCHES,
        "parameters": sum(p.numel() for p in trainer.model.parameters()), **inside(results, stepper),
    }  # fmt: skip


def timed(results: Results, stepper: Stepper, repeats: int, steps: int) -> dict:
    """Seconds per step: the median of `repeats` runs of `steps` steps, after steps on every batch to warm up."""
    for _ in range(len(stepper.trainer.batches)):
        loss = stepper.step()
    per_step = []
    for _ in range(repeats):
        results.clock.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            loss = stepper.step()
        results.clock.cuda.synchronize()
        per_step.append((time.perf_counter() - start) / steps)
    return {"seconds": statistics.median(per_step), "all_seconds": per_step, "loss": float(loss)}


def rates(found: dict, pairs: float, tokens: float, flops: float, device: str, top: dict) -> dict:
    from dpo_fast.training.throughput import peak_flops

    seconds, peak = found["seconds"], peak_flops(torch.device(device))
    return {
        **found, "pairs": pairs, "tokens": tokens, "pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds,
        "flops": flops, "flops_per_second": flops / seconds, "mfu": None if peak is None else flops / seconds / peak,
        "share_of_gemm_ceiling": flops / seconds / top["flops_per_second"],
    }  # fmt: skip


def inside(results: Results, stepper: Stepper) -> dict:
    """Peak memory, waits and kernels of one step each; where one of them fails, the times are kept."""
    row = {}
    for name, found in (
        ("peak_bytes", lambda: {"peak_bytes": peak_bytes(results, stepper)}),
        ("waits", lambda: waits(stepper.step, results.clock.cuda)),
        ("launches", lambda: kernels(stepper.step, results.device)),
    ):
        try:
            row |= found()
        except Exception as error:  # of the device, or of a profiler that names things otherwise
            row[name] = reason(error)
    return row


def peak_bytes(results: Results, stepper: Stepper) -> int | None:
    """The most memory during a step, weights and optimizer included."""
    cuda = results.clock.cuda
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    stepper.step()
    cuda.synchronize()
    return cuda.max_memory_allocated()
