"""torchtune's own recipe lora_dpo_single_device on a tiny model and a processor, with its loss and with ours in the YAML."""

import importlib.util
import json
import runpy
import sys
import tempfile
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torchtune.models.llama3 import llama3

OURS = "dpo_fast.integrations.torchtune.DPOLoss"
THEIRS = "torchtune.rlhf.loss.DPOLoss"
SIZES = {
    "vocab_size": 260, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 64,
    "intermediate_dim": 32,
}  # fmt: skip
FIXED = {
    "tokenizer": {"_component_": "torchtune_recipe.Bytes"}, "resume_from_checkpoint": False,
    "save_adapter_weights_only": False, "seed": 3, "shuffle": True, "batch_size": 2, "epochs": 1, "max_steps_per_epoch": 4,
    "optimizer": {"_component_": "torch.optim.SGD", "lr": 5.0}, "gradient_accumulation_steps": 1, "compile": False,
    "lr_scheduler": {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 1,
    },
    "log_every_n_steps": 1, "log_peak_memory_stats": False, "log_level": "INFO", "device": "cpu", "dtype": "fp32",
    "enable_activation_checkpointing": False, "enable_activation_offloading": False,
}  # fmt: skip


class Bytes:
    """A tokenizer with one token per byte, as the preference dataset calls it."""

    pad_id, eos_id, bos_id, max_seq_len = 0, 1, 2, 64

    def tokenize_messages(self, messages, **_):
        """Ids, and which of them are not scored."""
        ids, masked = [self.bos_id], [True]
        for message in messages:
            text = [byte + 3 for byte in message.text_content.encode()]
            ids, masked = ids + text, masked + [message.masked] * len(text)
        return [*ids, self.eos_id], [*masked, False]


def run(folder: Path, name: str, loss: dict, recipe: Path) -> list[dict]:
    """The numbers that the recipe logs at each step."""
    where = {
        "output_dir": str(folder / name),
        "model": {
            "_component_": "torchtune.models.llama3.lora_llama3", "lora_attn_modules": ["q_proj", "v_proj"],
            "apply_lora_to_mlp": False, "lora_rank": 4, "lora_alpha": 8, **SIZES,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelTorchTuneCheckpointer", "checkpoint_dir": str(folder / "model"),
            "checkpoint_files": ["model.pt"], "recipe_checkpoint": None, "output_dir": str(folder / name),
            "model_type": "LLAMA3",
        },
        "dataset": {
            "_component_": "torchtune.datasets.preference_dataset", "source": "json", "split": "train",
            "data_files": str(folder / "pairs.json"), "column_map": {"chosen": "chosen", "rejected": "rejected"},
        },
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(folder), "filename": f"{name}.txt",
        },
        "loss": loss,
    }  # fmt: skip
    OmegaConf.save(OmegaConf.create(FIXED | where), folder / f"{name}.yaml")
    given, sys.argv = sys.argv, [str(recipe), "--config", str(folder / f"{name}.yaml")]
    try:
        runpy.run_path(str(recipe), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.argv = given
    lines = [line for line in (folder / f"{name}.txt").read_text().splitlines() if line.startswith("Step")]
    pairs = [dict(word.split(":") for word in line.split("|")[1].split()) for line in lines]
    return [{key: float(value) for key, value in pair.items() if "tokens_per" not in key} for pair in pairs]


def compare() -> None:
    """Four steps with ours and with torchtune's loss log the same numbers, and the loss has moved."""
    package = Path(importlib.util.find_spec("torchtune").submodule_search_locations[0])
    recipe = package.parent / "recipes" / "lora_dpo_single_device.py"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "model").mkdir()
        torch.manual_seed(0)
        torch.save(llama3(**SIZES).state_dict(), folder / "model" / "model.pt")
        rows = [
            {
                side: [{"role": "user", "content": f"{i} plus 1 is"}, {"role": "assistant", "content": answer}]
                for side, answer in (("chosen", f"{i + 1}."), ("rejected", "no idea at all."))
            }
            for i in range(8)
        ]
        (folder / "pairs.json").write_text(json.dumps(rows))
        mine, theirs = (
            run(folder, name, {"_component_": kind, "beta": 0.1, "label_smoothing": 0.0}, recipe)
            for name, kind in (("ours", OURS), ("theirs", THEIRS))
        )
    worst = max(
        abs(a[key] - b[key]) / max(1.0, abs(b[key])) for a, b in zip(mine, theirs, strict=True) for key in theirs[0]
    )
    print(f"lora_dpo_single_device: losses {[round(a['loss'], 4) for a in mine]}, largest difference {worst:.1e}")
    assert len(mine) == 4
    assert abs(mine[-1]["loss"] - mine[0]["loss"]) > 1e-2, mine
    assert worst < 1e-5, (mine, theirs)
