"""dpo_fast: the fastest exact trainer for preference pairs (Direct Preference Optimization, arXiv 2305.18290)."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from .forest.packing import PrefixForest
from .losses import PreferenceOutput, preference_loss
from .ops import dpo_loss, linear_dpo_loss, linear_sequence_logps, linear_token_logps, sequence_logps, token_logps

if TYPE_CHECKING:
    from .training.config import DPOConfig
    from .training.trainer import DPOTrainer

# In a checkout kernels/ lies beside the package; installed, inside of it. Never both: a folder beside an installed
# package may be somebody else's kernels.
_root = Path(__file__).resolve().parent.parent
if not (_root / "dpo_fast" / "kernels").is_dir() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"
__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "PreferenceOutput",
    "PrefixForest",
    "dpo_loss",
    "linear_dpo_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "preference_loss",
    "sequence_logps",
    "token_logps",
]

# Names that need the extra [train]; importing dpo_fast needs torch and numpy alone.
_TRAIN = {"DPOConfig": "training.config", "DPOTrainer": "training.trainer"}


def __getattr__(name: str):
    if name not in _TRAIN:
        raise AttributeError(f"module 'dpo_fast' has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_TRAIN[name]}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("dpo_fast", "torch", "numpy"):
            raise
        raise ImportError(f"dpo_fast.{name} needs {error.name}: pip install 'dpo_fast[train]'") from error
    return getattr(module, name)
