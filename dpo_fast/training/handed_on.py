"""Names that are passed on to other libraries: a name that means nothing there is an error before any work is spent."""

import re

import torch
from transformers import get_scheduler


def check_schedule(args) -> None:
    """Build the learning rate schedule once, for a parameter of its own. Raises ValueError for arguments that do not fit."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    kwargs = dict(args.lr_scheduler_kwargs or {})
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1000, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ValueError(f"lr_scheduler_kwargs={kwargs} does not fit lr_scheduler_type={name}: {error}") from None


def check_lora_targets(model: torch.nn.Module, peft_config) -> None:
    """Raise ValueError unless every name in `target_modules` is a module's; PEFT asks that of one name only."""
    targets = getattr(peft_config, "target_modules", None)
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str) and targets != "all-linear":
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"lora_target_modules: {targets!r} is not a valid pattern: {error}") from None
    elif isinstance(targets, (list, tuple, set)):
        missing = sorted(t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names))
        if missing:
            there = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
            raise ValueError(
                f"lora_target_modules: the model has no module {', '.join(missing)}; its linear ones are "
                f"{', '.join(there)}"
            )
