"""Options that change no number here: they are accepted, set back to their defaults and named in one warning.

TRL's users have them in their files. Options that would change what is computed are refused instead (config.py,
cli/options.py).
"""

from collections.abc import Iterable, Mapping, MutableMapping

import torch

from ..loss_table import LOSSES
from ..losses import LossOptions

# name -> the values that ask for nothing, and so need no warning
UNUSED: dict[str, tuple] = {
    # Nothing is padded.
    "pad_token": (None,),
    "pad_to_multiple_of": ("auto", None),
    "length_column_name": ("length",),
    # The columns are those of the data's layout.
    "remove_unused_columns": (False,),
    "label_names": (None,),
    # Memory and speed: max_tokens_per_batch bounds the memory, and the gradient stays that of the whole batch.
    "auto_find_batch_size": (False,),
    "activation_offloading": (False,),
    "torch_empty_cache_steps": (None,),
    "use_cache": (False,),
    # Evaluation runs in the precision of the reference's log-probs and keeps one row of numbers per pair, no logits.
    "bf16_full_eval": (False,),
    "fp16_full_eval": (False,),
    "eval_accumulation_steps": (None,),
    "eval_do_concat_batches": (True,),
    "eval_use_gather_object": (False,),
    "batch_eval_metrics": (False,),
    "include_for_metrics": ([],),
    "do_predict": (False,),
    # Tokens are always counted (num_tokens in the log).
    "include_num_input_tokens_seen": ("no", False),
}
_PRECOMPUTED = ("precompute_ref_batch_size", "ref_cache_dir")


def unused_options(values: Mapping, defaults: Mapping) -> dict[str, str]:
    """Options of DPOConfig among `values` that have no effect, each with the reason ("" where it never has one here)."""
    found = {name: "" for name, fine in UNUSED.items() if not any(values[name] is x or values[name] == x for x in fine)}
    if getattr(values["train_sampling_strategy"], "value", values["train_sampling_strategy"]) == "group_by_length":
        found["train_sampling_strategy"] = ""

    def idle(names, why: str) -> None:
        found.update({name: why for name in names if values[name] != defaults[name]})

    if not _has_gpu(values):
        idle(("use_liger_kernel", "liger_kernel_config"), "Liger's kernels need a GPU")
    elif not values["use_liger_kernel"]:
        idle(("liger_kernel_config",), "without use_liger_kernel")
    names = [values["loss_type"]] if isinstance(values["loss_type"], str) else values["loss_type"]
    rows = [LOSSES[name] for name in names if name in LOSSES]
    if all(name in LOSSES for name in names) and not LossOptions(names).has_reference:
        if values["precompute_ref_log_probs"]:
            found["precompute_ref_log_probs"] = "without a reference"
        idle(("sync_ref_model", *_PRECOMPUTED), "without a reference")
    if values["precompute_ref_log_probs"] is False:
        idle(_PRECOMPUTED, "without precompute_ref_log_probs")
    if not values["sync_ref_model"]:
        idle(("ref_model_mixup_alpha", "ref_model_sync_steps"), "without sync_ref_model")
    if values["f_divergence_type"] != "alpha_divergence":
        idle(("f_alpha_divergence_coef",), "without f_divergence_type=alpha_divergence")
    if not isinstance(values["max_length"], int):
        idle(("truncation_mode",), "without max_length")
    for option in ("discopop_tau", "simpo_gamma"):
        if not any(option in row.options for row in rows):
            idle((option,), f"without loss_type {option.partition('_')[0]}")
    return found


def _has_gpu(values: Mapping) -> bool:
    return torch.cuda.is_available() and not values["use_cpu"]


def set_back(values: MutableMapping, defaults: Mapping, found: Iterable[str]) -> None:
    """Give the options named in `found` their defaults."""
    values.update({name: defaults[name] for name in found})


def sentence(found: Mapping[str, str]) -> str:
    """The one warning that names them all."""
    why = dict.fromkeys(found.values())
    groups = [", ".join(n for n in found if found[n] == w) + (f" ({w})" if w else "") for w in why]
    return f"these options change no number here and are not used: {'; '.join(groups)}"
