"""A loop small enough for tests: a byte-level Llama of one layer, eleven prompts and a rule as judge."""

import json
from pathlib import Path

import torch
from tiny import llama

from dpo_fast.demo.questions import byte_tokenizer
from dpo_fast.loop.settings import AnnotateSection, GenerateSection, Settings


def vowels(prompt, completion):
    """The judge, which counts the characters of the completion that are in the first half of the alphabet."""
    return sum(c.lower() in "abcdefghijklm" for c in completion) / (1 + len(completion))


def make_folder(folder: Path) -> Path:
    """Write a model and prompts below `folder`."""
    llama(vocab_size=259, dtype=torch.float32, num_hidden_layers=1, bos_token_id=0, eos_token_id=1).save_pretrained(
        folder / "model"
    )
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"Say {i}" + " again" * (i % 3)} for i in range(11)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, output: Path, **changes) -> Settings:
    """Settings of two rounds with four prompts held out."""
    train = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "verify": False,
        "dataloader_pin_memory": False,
        "ref_cache_dir": str(output / "ref_cache"),
    }
    values = {
        "model": str(folder / "model"),
        "prompts": str(folder / "prompts.jsonl"),
        "output_dir": str(output / "loop"),
        "rounds": 2,
        "heldout": 4,
        "generate": GenerateSection(num_generations=3, max_new_tokens=12),
        "annotate": AnnotateSection(judge=vowels),
    }
    return Settings(**{**values, "train": train | changes.pop("train", {}), **changes})
