"""The README.md that is saved with a model: its base model, data, options and last metrics."""

from pathlib import Path

TAGS = ("dpo_fast", "dpo")
_METRICS = ("loss", "rewards/accuracies", "rewards/margins")


def model_card(trainer, *, model_name: str | None = None, tags=(), dataset=None) -> str:
    """Markdown with the metadata block that model hubs read."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    adapters = trainer.setup.adapters
    found = dict.fromkeys(
        [*TAGS, *(getattr(model, "model_tags", None) or ()), *([tags] if isinstance(tags, str) else tags or ())]
    )
    head = {"library_name": "peft" if adapters else "transformers", "pipeline_tag": "text-generation"}
    # Only a hub name is given: a folder of this machine means nothing elsewhere.
    if base and not Path(base).exists():
        head["base_model"] = base
    lines = ["---", *(f"{key}: {value}" for key, value in head.items()), "tags:", *(f"- {tag}" for tag in found)]
    if dataset:
        lines += ["datasets:", *(f"- {name}" for name in ([dataset] if isinstance(dataset, str) else dataset))]
    options = {
        "loss": " + ".join(args.loss_type),
        "beta": args.beta,
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        **_step(args),
        "steps": trainer.state.global_step,
        "pairs": _pairs(trainer.train_dataset),
        "seed": args.seed,
    }
    lines += ["---", "", f"# {model_name or Path(args.output_dir).name}", ""]
    what = "Adapters for a language model" if adapters else "A language model"
    lines += [
        f"{what}, trained on preference pairs with dpo_fast (Direct Preference Optimization, arXiv 2305.18290).",
        "",
    ]
    lines += ["| option | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in options.items()), ""]
    if metrics := _last_metrics(trainer.state.log_history):
        lines += ["| metric | value |", "| --- | --- |", *(f"| {n} | {v:.4f} |" for n, v in metrics.items()), ""]
    return "\n".join(lines)


def _last_metrics(history: list[dict]) -> dict[str, float]:
    """The last value of each metric, of evaluation and of training."""
    wanted = [*(f"eval_{name}" for name in _METRICS), *_METRICS]
    last = {name: value for row in history for name, value in row.items() if name in wanted}
    return {name: last[name] for name in wanted if name in last}


def _step(args) -> dict[str, int]:
    if args.tokens_per_step is not None:
        return {"tokens per step": args.tokens_per_step}
    return {"pairs per step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size}


def _pairs(data) -> int | str:
    if data is None:
        return 0
    return len(data) if hasattr(data, "__len__") else "streamed"
