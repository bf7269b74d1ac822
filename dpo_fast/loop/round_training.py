"""One round's training by the public trainer, with the options of the section `train`."""

import json
import shutil
from pathlib import Path

import torch
from transformers import PrinterCallback

from ..cli.parse import parse
from ..data.pairs import PairDataset
from ..training import checkpoint
from ..training.run_setup import load_model, load_tokenizer
from ..training.trainer import DPOTrainer
from .candidates import write_whole
from .export import write_rows
from .settings import Settings

_SAMPLE = 64  # pairs


def training_options(settings: Settings, model: str, pairs: Path, folder: Path):
    """The (DPOConfig, ModelArguments) of a round. Raises ValueError for an option of `train` that cannot be honoured."""
    ours = {"report_to": "none", "save_strategy": "no", "logging_steps": 0.1, "seed": settings.seed}
    if not torch.cuda.is_available():
        ours["bf16"] = False
    names = {"model_name_or_path": model, "dataset_name": [str(pairs)], "output_dir": str(folder)}
    _, args, model_args = parse([], {**ours, **settings.train, **names})
    return args, model_args


def train_round(
    settings: Settings, model: str, reference: str | None, pairs: list, heldout: list, folder: Path
) -> dict:
    """Train `model` on the rows `pairs`, save it as `folder`/model, and return the measurements.

    `reference` is the folder or name of the reference, or None for the model itself. A folder that has its model is left
    alone; an interrupted training goes on from its last checkpoint.
    """
    measured = folder / "training.json"
    if (folder / "model").is_dir():
        return json.loads(measured.read_text())
    write_rows(folder / "training_pairs.jsonl", pairs)
    args, model_args = training_options(settings, model, folder / "training_pairs.jsonl", folder / "checkpoints")
    trainer = DPOTrainer(
        load_model(model, args),
        ref_model=None if reference is None else load_model(reference, args),
        args=args,
        train_dataset=pairs,
        eval_dataset=heldout or None,
        processing_class=load_tokenizer(model, args),
        peft_config=model_args.peft_config(),
    )
    trainer.remove_callback(PrinterCallback)
    whole = checkpoint.complete_checkpoints(args.output_dir)
    trained = trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
    # For a comparison with the held-out pairs, as many training pairs are enough.
    sample = PairDataset(trainer.train_dataset.examples[: max(_SAMPLE, len(heldout))])
    before, after = trainer.evaluate(sample, metric_key_prefix="train"), trainer.evaluate() if heldout else {}
    result = {
        "loss": trained.training_loss,
        "train_accuracy": before.get("train_rewards/accuracies"),
        "train_sample": len(sample),
        "accuracy": after.get("eval_rewards/accuracies"),
        "margin": after.get("eval_rewards/margins"),
        "chosen_delta": after.get("eval_logps/chosen_delta"),
        "steps": trainer.state.global_step,
    }
    if not all(torch.isfinite(p).all() for p in trainer.model.parameters()):
        raise ValueError("training gave weights that are not finite: lower the learning rate, or raise beta")
    _save(trainer, folder)
    write_whole(measured, json.dumps(result, indent=1) + "\n")
    (folder / "model.part").rename(folder / "model")
    shutil.rmtree(args.output_dir, ignore_errors=True)
    return result


def _save(trainer: DPOTrainer, folder: Path) -> None:
    model = trainer.model.merge_and_unload() if hasattr(trainer.model, "merge_and_unload") else trainer.model
    shutil.rmtree(folder / "model.part", ignore_errors=True)
    model.save_pretrained(folder / "model.part")
    trainer.processing_class.save_pretrained(folder / "model.part")
