"""Axolotl's own DPO training of a tiny model, without our plugin and with it in the YAML: the same losses and metrics.

Every case counts the calls of our log-probs: none without the plugin, at least one per step with it.

python tests/peers/run_axolotl.py [CHECKOUT]      # of Axolotl; default: the installed package
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
if len(sys.argv) > 1:
    sys.path.insert(0, str(Path(sys.argv[1]) / "src"))
os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

import tiny
import torch
import trl
import yaml
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train

import dpo_fast.integrations.trl as ours_of_trl
from dpo_fast.demo.questions import byte_tokenizer

PLUGIN = "dpo_fast.integrations.axolotl.DPOFastPlugin"
COMMON = {
    "rl": "dpo", "sequence_len": 64, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 4,
    "num_epochs": 1, "learning_rate": 0.05, "optimizer": "sgd", "lr_scheduler": "constant", "logging_steps": 1,
    "bf16": False, "fp16": False, "tf32": False, "seed": 3, "save_strategy": "no", "rl_beta": 0.3, "warmup_steps": 0,
    "dataset_num_proc": 1, "use_tensorboard": False, "gradient_checkpointing": False,
}  # fmt: skip
CASES = {
    "sigmoid": {},
    "ipo": {"rl": "ipo"},
}


def prepare(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    model = tiny.llama(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=512)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    rows = [{"prompt": f"{i} plus 1 is ", "chosen": f"{i + 1}.", "rejected": "no idea at all."} for i in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: Path, name: str, options: dict) -> list[dict]:
    data = {
        "path": str(folder / "pairs.jsonl"),
        "ds_type": "json",
        "split": "train",
        "type": {"field_prompt": "prompt"},
    }
    where = {"base_model": str(folder / "model"), "output_dir": str(folder / name), "datasets": [data]}
    where["dataset_prepared_path"] = str(folder / "prepared")
    (folder / "config.yaml").write_text(yaml.safe_dump(COMMON | where | options))
    logs, log = [], trl.DPOTrainer.log

    def kept(self, values, *arguments, **others):
        log(self, values, *arguments, **others)
        if "loss" in values:
            logs.append(self.state.log_history[-1])

    trl.DPOTrainer.log = kept
    try:
        do_train(load_cfg(str(folder / "config.yaml")), TrainerCliArgs())
    finally:
        trl.DPOTrainer.log = log
    return logs


def counted() -> list[tuple]:
    """A list that gets the shape of the logits of every call of our `selective_log_softmax`."""
    calls, function = [], ours_of_trl.selective_log_softmax

    def call(logits, index):
        calls.append(tuple(logits.shape))
        return function(logits, index)

    ours_of_trl.selective_log_softmax = call
    return calls


def main() -> None:
    import trl.trainer.dpo_trainer as module

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder)
        original, calls = module.selective_log_softmax, counted()
        for name, options in CASES.items():
            theirs = train(folder, f"theirs {name}", options)
            assert not calls, f"{name}: ours was called without the plugin"
            ours = train(folder, f"ours {name}", options | {"plugins": [PLUGIN]})
            found = len(calls)
            calls.clear()
            assert module.selective_log_softmax is original, "not undone"
            keys = [
                k for k in theirs[0] if k in ("loss", "grad_norm") or k.startswith(("rewards/m", "logps/", "logits/"))
            ]
            worst = max(
                abs(float(a[k]) - float(b[k])) / max(1.0, abs(float(b[k])))
                for a, b in zip(ours, theirs, strict=True)
                for k in keys
            )
            print(
                f"{name}: losses {[round(float(a['loss']), 4) for a in ours]}, largest difference {worst:.1e} in {keys}, "
                f"{found} calls of ours"
            )
            assert len(ours) == 4
            assert found >= 2 * len(ours), "a step has one call for the policy and one for the reference"
            assert worst < 1e-5, (ours, theirs)


if __name__ == "__main__":
    main()
