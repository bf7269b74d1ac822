"""What the rows of the table of ops (op_table.py) are made of: an op, its options by name."""

import dataclasses
import itertools
from collections.abc import Callable

import torch
from op_samples import Row

from dpo_fast import reference

STATISTICS = tuple(reference.STATISTICS)
NEEDS = [n for k in range(4) for n in itertools.combinations(("hidden", "weight", "bias"), k)]
FROZEN, TRAINED = ("hidden",), ("hidden", "weight", "bias")
HEADS = {"frozen": FROZEN, "trained": TRAINED}
# Nothing is ignored: what is kept of an ignored row is not written, and opcheck compares it.
FULL = ((0, 5), (0, 2), (0, 3), (0, 1))
PAIRS = ((0, 2), (1, 2), (0, 1), (2, 3))
BATCHES = {"padded": False, "packed": True}
TRANSFORMS = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "all": {"logit_scale": -1.5, "softcap": 2.5, "temperature": 1.9},
}
POSITIVE = {"all": {"logit_scale": 1.5}}  # a mask times a negative number is the largest logit
# Options of every loss that has some, then what is no single loss with its defaults.
SMOOTHED = {"exo_pair": 0.1, "robust": 0.2, "aot": 0.1, "simpo": 0.1}
LOSSES = {name: {"loss_type": name} for name in reference.FORMULAS}
for _name, _e in SMOOTHED.items():
    LOSSES[_name]["label_smoothing"] = _e
LOSSES["discopop"]["discopop_tau"] = 0.2
LOSSES["simpo"] |= {"simpo_gamma": 0.3, "beta": 1.5}
SOFT, INNER = torch.tensor([0.0, 0.1, 0.25, 0.4]), torch.tensor([0.02, 0.1, 0.25, 0.4])
MIXED = {
    "smoothed": {"label_smoothing": 0.2},
    "discopop, tau 0.05": {"loss_type": "discopop"},
    "two": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.4]},
    "three": {"loss_type": ["hinge", "ipo", "sft"], "beta": 0.3},
    "with aot": {"loss_type": ["sigmoid", "aot_unpaired"]},
    "weighted pairs": {"pair_weights": torch.tensor([0.2, 1.5, 1.0, 3.0])},
    "twice": {"loss_weights": [2.0]},
    "forward_kl": {"f_divergence_type": "forward_kl", "loss_type": "hinge"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "js": {"f_divergence_type": "js_divergence", "loss_type": "discopop"},
    "soft": {"label_smoothing": SOFT},
    "soft robust": {"loss_type": "robust", "label_smoothing": SOFT},
    "soft exo_pair": {"loss_type": "exo_pair", "label_smoothing": INNER},
    "soft and weighed": {"label_smoothing": SOFT, "pair_weights": 1 + SOFT},
    "sft tokens": {"sft_weight": 0.3},
    "sft pairs": {"sft_weight": 0.3, "sft_mean": "pairs"},
    "mean length": {"loss_type": "orpo", "mean_chosen_length": 2.5},
    "mean length, tensor": {"loss_type": "orpo", "mean_chosen_length": torch.tensor(2.5)},
}
# Of token log-probs: what dpo_loss and linear_dpo_loss take beside preference_loss.
TOKENS = {
    "ld_alpha": {"ld_alpha": 0.4},
    "ld_alpha 0": {"ld_alpha": 0.0},
    "average": {"average_log_prob": True, "beta": 2.0},
    "average and sft": {"average_log_prob": True, "sft_weight": 0.3},
    "transform": {"logit_scale": 0.7, "softcap": 4.0, "temperature": 1.3},
}


@dataclasses.dataclass(frozen=True)
class Op:
    """An op of the table."""

    function: Callable
    truth: Callable
    rows: dict[str, Row]
    back_ends: bool = True  # False: plain torch, without the option `backend`
    twice: bool = False  # backward may run twice, where the graph was kept
    loss: bool = False  # what comes back is a PreferenceOutput


def merged(*tables: dict[str, Row]) -> dict[str, Row]:
    found = {}
    for table in tables:
        assert not found.keys() & table.keys()
        found |= table
    return found
