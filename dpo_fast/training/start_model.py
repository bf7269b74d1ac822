"""The model as it was when its run began, loaded once more: the reference of rows that are named after training.

Under full fine-tuning with a cached reference no second model is kept. Rows known at the start have their log-probs in the
cache; others need the start weights again.
"""

import logging

import torch

from ..forest.gate import base_model
from ..forest.model import own_config, prepare_model
from .compiling import compile_layers
from .dropout import no_dropout
from .load import load_model
from .ref_cache import weights_fingerprint

logger = logging.getLogger(__name__)
_INSTEAD = (
    "pass these rows as eval_dataset at construction, or set precompute_ref_log_probs=False, which keeps a second model"
)


def warn_without_name(trainer) -> None:
    """Say before training that rows which are not known yet will have no reference after it."""
    if trainer.setup.start_name is None and trainer.is_world_process_zero():
        logger.warning(
            "the model has no name to load it from again, so after training evaluate() takes only rows that were given "
            "as eval_dataset at construction (or set precompute_ref_log_probs=False)"
        )


def start_model(trainer) -> torch.nn.Module:
    """The start weights of `trainer`'s run in a model that is ready for `precompute`.

    Raises ValueError where they cannot be loaded: a model without a name, a folder that is gone, or whose weights are no
    longer those that the run began with.
    """
    setup, args = trainer.setup, trainer.args
    if setup.start_name is None:
        raise ValueError(f"the start weights, which are the reference, have no name to load them from: {_INSTEAD}")
    try:
        model = load_model(setup.start_name, args, shared=setup.plan.path == "shared")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the start weights, which are the reference, cannot be loaded again ({error}): {_INSTEAD}"
        ) from error
    model = model.to(next(base_model(trainer.model).parameters()).dtype)
    own_config(model)
    if args.disable_dropout:
        no_dropout(model)
    if weights_fingerprint(model) != trainer.start_fingerprint():
        raise ValueError(
            f"{setup.start_name} does not hold the weights that this run began with, which are the reference: {_INSTEAD}"
        )
    prepare_model(model, workspace_bytes=args.workspace_bytes, backend=args.backend)
    compile_layers(model, args)
    return model.requires_grad_(False).eval()
