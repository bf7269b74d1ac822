"""The column p_chosen of a pair, the chance that the chosen one is better: what it may do, and what it excludes."""

import torch

from ..losses import LossOptions, check_label_smoothing

LABEL_NOISE = ("smoothing", "weight", "ignore")


def check_label_noise(args) -> None:
    """Raise ValueError unless `label_noise` is one of LABEL_NOISE or None, and excludes no other option."""
    if args.label_noise not in (None, *LABEL_NOISE):
        raise ValueError(f"label_noise={args.label_noise!r} is not one of {', '.join(LABEL_NOISE)}")
    if args.label_noise == "smoothing":
        _refuse_number_beside_p_chosen(args)


def check_p_chosen(args, values: list[float], name: str) -> None:
    """Raise ValueError where the loss cannot take these values of the column p_chosen of the `name` data."""
    if args.label_noise == "weight":
        return
    _refuse_number_beside_p_chosen(args)
    options = LossOptions.of(args)
    try:
        options.check(soft_labels=True)
        check_label_smoothing(1 - torch.tensor(values, dtype=torch.float64), options)
    except ValueError as error:
        raise ValueError(
            f"the {name} data has a column p_chosen (label_smoothing = 1 - p_chosen): {error}; or set label_noise to "
            "weight or ignore"
        ) from None


def _refuse_number_beside_p_chosen(args) -> None:
    if args.label_smoothing != LossOptions.label_smoothing:
        raise ValueError(
            f"label_smoothing={args.label_smoothing} and the smoothing of each pair by p_chosen exclude each other: leave "
            "label_smoothing out, or set label_noise to weight or ignore"
        )
