"""Short runs of the trainer on tiny models: their config, a run, and the weights it leaves."""

import torch

from dpo_fast import DPOConfig, DPOTrainer

LR = 0.05


def config(folder, **changes) -> DPOConfig:
    defaults = {
        "output_dir": str(folder / "run"), "ref_cache_dir": str(folder / "ref"), "report_to": "none", "use_cpu": True,
        "bf16": False, "optim": "sgd", "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 8,
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    if changes.get("precompute_ref_log_probs") is False or changes.get("loss_type") in (["orpo"], ["simpo"]):
        del defaults["ref_cache_dir"]  # refused where it has no effect
    return DPOConfig(**{**defaults, **changes})


def train(folder, model, rows, *, trainer_options=None, **changes) -> DPOTrainer:
    trainer = DPOTrainer(model, args=config(folder, **changes), train_dataset=rows, **(trainer_options or {}))
    trainer.train()
    return trainer


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
