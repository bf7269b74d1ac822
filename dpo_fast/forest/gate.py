"""What kind of model this is: in which of three ways its trunk runs over a forest, and how it transforms its logits.

Everything here reads the config and the module tree and runs nothing; `prepare_model` (model.py) checks by running.

    shared    the whole forest in one row of tokens (attention.py), for models whose attention can be given a forest
    padded    one sequence per batch row under the model's own attention, for models that mix tokens in another way
    segments  one call per segment, which hands on a state, for a module that is not from transformers (`HiddenStateModel`)
"""

import dataclasses
import sys
from typing import Any, Protocol

import torch

from .head import output_layer


class HiddenStateModel(Protocol):
    """The methods that dpo_fast needs of a module that is not from transformers.

    `hidden_states` maps token ids [1, t] to hidden states [1, t, D] and a state. With `carries_state = True` it accepts
    that state and continues from it, so prompts are shared by handing it on; otherwise every sequence is computed whole.
    `get_output_embeddings()` returns the head: a module with `weight` [V, D] and maybe `bias` [V].
    """

    carries_state: bool

    def hidden_states(self, input_ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]: ...

    def get_output_embeddings(self) -> torch.nn.Module: ...


@dataclasses.dataclass(frozen=True)
class LogitTransform:
    """A model's transform of its head's output: `softcap * tanh(linear(h) * logit_scale / softcap)`."""

    logit_scale: float = 1.0
    softcap: float | None = None


@dataclasses.dataclass(frozen=True)
class RopeRegime:
    """Rotary frequencies that depend on the length of a batch row: they change above `limit` tokens."""

    kind: str  # "longrope": one other set of frequencies above the limit; "dynamic": another set per length above it
    limit: int

    def of(self, length: int) -> int:
        """A number for rows of `length` tokens; rows with equal numbers have the same frequencies."""
        if length <= self.limit:
            return 0
        return length if self.kind == "dynamic" else 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The decision for one model. `obstacle` says why it is padded; `logits` is the transform of its logits."""

    path: str  # "shared", "padded" or "segments"
    obstacle: str | None
    logits: LogitTransform
    share: bool  # whether prompts can be shared
    regimes: tuple["RopeRegime", ...] = ()  # rows whose frequencies differ under these cannot share a padded batch
    attention: str | None = None  # the attention implementation that a padded model must run; None: the one it has


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The causal LM inside PEFT's, DDP's and accelerate's wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "module") and isinstance(model.module, torch.nn.Module):
            model = model.module
        else:
            return model


def computes_in_half(model: torch.nn.Module) -> bool:
    """Whether log-probs are as coarse as half precision: by the weights' type, or by layers that compute so or in 8 bits."""
    half = (torch.float16, torch.bfloat16)
    return next(model.parameters()).dtype in half or any(
        getattr(module, "compute_dtype", None) in half
        or getattr(getattr(module, "weight", None), "dtype", None) == torch.int8
        for module in model.modules()
    )


def plan_model(model: torch.nn.Module) -> Plan:
    """Choose the path of a bare model. Raises ValueError for a model that no path computes correctly."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "base_model_prefix"):
        for name in ("hidden_states", "get_output_embeddings"):
            if not callable(getattr(model, name, None)):
                raise ValueError(
                    f"{type(model).__name__} is not a transformers model and has no {name}(): "
                    "implement dpo_fast.forest.gate.HiddenStateModel (two methods) to train it"
                )
        return Plan("segments", None, LogitTransform(), bool(getattr(model, "carries_state", False)))
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder model: dpo_fast trains causal language models")
    if output_layer(model) is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: load it with AutoModelForCausalLM")
    obstacle, regimes = sharing_obstacle(model), rope_regimes(config)
    path = "padded" if obstacle else "shared"
    return Plan(path, obstacle, read_logit_transform(config), obstacle is None, regimes)


def sharing_obstacle(model: torch.nn.Module) -> str | None:
    """The reason why the trunk cannot run over a forest, or None. It reads the config and runs nothing."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return f"{config.model_type} does not use transformers' attention interface"
    kinds = set(getattr(config, "layer_types", None) or [])
    foreign = kinds - {"full_attention", "sliding_attention"}
    if foreign:
        return f"{config.model_type} has layers of type {', '.join(sorted(foreign))}"
    if getattr(config, "attention_chunk_size", None):
        return f"{config.model_type} attends in chunks of {config.attention_chunk_size} tokens"
    for name in ("ssm_cfg", "mamba_d_state", "ssm_state_size", "state_size", "linear_conv_kernel_dim", "conv_L_cache"):
        if getattr(config, name, None) is not None:
            return f"{config.model_type} has a recurrent state ({name})"
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is False:
        return f"{config.model_type} attends to later tokens"
    kinds = sorted({regime.kind for regime in rope_regimes(config)})
    if kinds:
        return f"{config.model_type} scales its rotary positions with the row's length ({', '.join(kinds)})"
    return None


def rope_parameters(config) -> list[dict]:
    """The config's rotary parameters, one dictionary per kind of layer; empty without rotary positions."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [v for v in rope.values() if isinstance(v, dict) and "rope_type" in v] or ([rope] if rope else [])


def rope_regimes(config) -> tuple[RopeRegime, ...]:
    """The limits above which rotary frequencies depend on the row's length, as in transformers' `dynamic_rope_update`."""
    text, regimes = config.get_text_config(), set()
    for rope in rope_parameters(config):
        kind = rope.get("rope_type") or ""
        if kind == "longrope":
            regimes.add(RopeRegime(kind, rope.get("original_max_position_embeddings") or text.max_position_embeddings))
        elif "dynamic" in kind:
            regimes.add(RopeRegime("dynamic", text.max_position_embeddings))
    return tuple(sorted(regimes, key=lambda r: (r.kind, r.limit)))


def read_logit_transform(config) -> LogitTransform:
    """Scale and soft-cap of the logits, read from the names that configs have for them."""
    text = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(text, name, None) or 1.0
    if getattr(text, "logits_scaling", None):
        scale /= text.logits_scaling
    elif getattr(text, "dim_model_base", None):
        scale /= text.hidden_size / text.dim_model_base
    softcaps = (getattr(text, n, None) for n in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))
    return LogitTransform(scale, next(filter(None, softcaps), None))


def has_aux_loss(model: torch.nn.Module) -> bool:
    """Whether the model has a router whose load-balancing loss can be computed."""
    model = base_model(model)
    config = getattr(model, "config", None)
    return (
        config is not None
        and hasattr(config.get_text_config(), "output_router_logits")
        and hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    )
