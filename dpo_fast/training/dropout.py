"""Switching dropout off: in dropout modules, and in the probabilities that a model's code passes to `F.dropout`."""

import torch

# Parts of the names that transformers' models give to the probability of a random omission or change of activations.
_NAMES = ("dropout", "pdrop", "layerdrop", "drop_path", "drop_prob", "drop_rate", "jitter")
# Where a module keeps this name it is no probability: phimoe compares experts with it, in evaluation too.
_THRESHOLD = "router_jitter_noise"


def no_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability of `model` to 0: in modules, their attributes, and the fields of the configs they hold.

    Equivalent where all dropout is in modules: `for m in model.modules(): if isinstance(m, nn.Dropout): m.p = 0.0`. The
    configs are changed in place, so give the model its own first (`forest.model.own_config`).
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero(module)
        for value in list(vars(module).values()):
            if hasattr(value, "to_dict"):
                _zero_config(value)


def random_router(model: torch.nn.Module) -> str | None:
    """The class of a router that draws experts at random in training mode, which no option turns off (phimoe's); or None."""
    return next((type(m).__name__ for m in model.modules() if hasattr(m, _THRESHOLD)), None)


def _zero_config(config) -> None:
    _zero(config)
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict"):
            _zero_config(value)


def _zero(holder) -> None:
    for name, value in list(vars(holder).items()):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and value and name != _THRESHOLD and any(part in name for part in _NAMES):
            setattr(holder, name, type(value)(0))
