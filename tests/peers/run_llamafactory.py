"""LLaMA-Factory's own DPO workflow on a tiny model, unpatched and under patch_llamafactory: the same losses and metrics.

python tests/peers/run_llamafactory.py [CHECKOUT]      # of LLaMA-Factory; default: the installed package

Its `ipo` and `hinge` are run too, where the two must differ: with TRL 0.24 LLaMA-Factory trains sigmoid under these names.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
if len(sys.argv) > 1:
    sys.path.insert(0, str(Path(sys.argv[1]) / "src"))
os.environ["DISABLE_VERSION_CHECK"] = "1"  # LLaMA-Factory's own switch: transformers may be newer than its pin.
if importlib.util.find_spec("torchaudio") is None:
    # It imports this for sound, and there is none here.
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

import tiny
import torch
from llamafactory.train.tuner import run_exp

from dpo_fast.demo.questions import byte_tokenizer
from dpo_fast.integrations.llamafactory import patch_llamafactory

COMMON = {
    "stage": "dpo", "do_train": True, "finetuning_type": "full", "template": "empty", "dataset": "pairs",
    "cutoff_len": 64, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.05, "optim": "sgd",
    "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
    "seed": 3, "preprocessing_num_workers": 1, "overwrite_cache": True, "disable_tqdm": True, "pref_beta": 0.3,
    "disable_gradient_checkpointing": True,  # its own does not know transformers 5.17 and later
}  # fmt: skip
SAME = {
    "sigmoid": {},
    "an sft term": {"pref_ftx": 0.5},
    "orpo": {"pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo", "simpo_gamma": 0.4},
    "bco term": {"pref_bco_weight": 0.5},
    "ld_alpha": {"ld_alpha": 0.5},
    "LoRA": {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"},
}
DIFFERENT = {"ipo": {"pref_loss": "ipo"}, "hinge": {"pref_loss": "hinge"}}


def prepare(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    model = tiny.llama(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=512)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    rows = [
        {"instruction": f"{i} plus 1 is", "input": "", "chosen": f"{i + 1}.", "rejected": "no idea at all."}
        for i in range(8)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    (folder / "dataset_info.json").write_text(
        json.dumps({"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}})
    )


def train(folder: Path, name: str, options: dict) -> list[dict]:
    where = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder), "output_dir": str(folder / name)}
    run_exp(COMMON | where | options)
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [log for log in history if "loss" in log]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder)
        for name, options in (SAME | DIFFERENT).items():
            theirs = train(folder, f"theirs {name}", options)
            undo = patch_llamafactory()
            try:
                ours = train(folder, f"ours {name}", options)
            finally:
                undo()
            worst = max(
                abs(a[key] - b[key]) / max(1.0, abs(b[key]))
                for a, b in zip(ours, theirs, strict=True)
                for key in b
                if key in ("loss", "grad_norm")
                or key.startswith(("rewards/m", "rewards/c", "rewards/r", "logps/", "logits/"))
            )
            print(f"{name}: losses {[round(a['loss'], 4) for a in ours]}, largest difference {worst:.1e}")
            assert len(ours) == 4
            assert (worst < 1e-5) == (name in SAME), (ours, theirs)


if __name__ == "__main__":
    main()
