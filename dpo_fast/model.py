"""A model's trunk over a prefix forest and its head on the live rows, behind the model's own `forward`.

`prepare_model(model)` gives `model(forest=...)` beside the model's ordinary call, inside the same `forward`, so that DDP,
FSDP, PEFT and autocast see one module call. Three ways through the trunk, the first that is right for the model:

    shared    one row for the whole forest (attention.py), for models whose attention can be given a forest
    padded    one sequence a batch row, the model's own attention, for models that mix tokens in another way
    segments  a module that is not from transformers (`HiddenStateModel`): one call a segment, its state carried on

What a model does between trunk and logits (scale, soft-cap, bias) is read from its config and checked by `probe`.
"""

import contextlib
import contextvars
import dataclasses
import functools
import sys
import types
from typing import Any, Protocol

import torch

from . import attention
from .ops import WORKSPACE_BYTES, linear_token_logps
from .packing import PrefixForest

_on_forest = contextvars.ContextVar("dpo_fast_on_forest", default=False)


class HiddenStateModel(Protocol):
    """What dpo_fast needs of a module that is not from transformers.

    `hidden_states` maps token ids [1, t] to hidden states [1, t, D] and a state. With `carries_state = True` it accepts
    that state as the beginning of a continuation, and prompts are shared by carrying it on; else every sequence is
    computed whole. `get_output_embeddings()` returns the head: a module with `weight` [V, D] and maybe `bias` [V].
    """

    carries_state: bool

    def hidden_states(self, input_ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]: ...

    def get_output_embeddings(self) -> torch.nn.Module: ...


@dataclasses.dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits: `softcap * tanh(linear(h / divide) * logit_scale / softcap)`."""

    logit_scale: float = 1.0
    softcap: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `prepare_model` decided. `obstacle` says why a model is padded; `head` how its logits come about."""

    path: str  # "shared", "padded" or "segments"
    obstacle: str | None
    head: Head
    share: bool  # whether prompts can be shared


def running_on_forest() -> bool:
    """Whether a forest row is on its way through a trunk in this context."""
    return _on_forest.get()


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The causal LM inside PEFT's, DDP's and accelerate's wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "module") and isinstance(model.module, torch.nn.Module):
            model = model.module
        else:
            return model


def plan_model(model: torch.nn.Module) -> Plan:
    """Choose the path for a bare model. Raises ValueError for a model that no path computes correctly."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "base_model_prefix"):
        for name in ("hidden_states", "get_output_embeddings"):
            if not callable(getattr(model, name, None)):
                raise ValueError(
                    f"{type(model).__name__} is not a transformers model and has no {name}(): "
                    "implement dpo_fast.model.HiddenStateModel (two methods) to train it"
                )
        return Plan("segments", None, Head(), bool(getattr(model, "carries_state", False)))
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder model: dpo_fast trains causal language models")
    if output_layer(model) is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: load it with AutoModelForCausalLM")
    obstacle = sharing_obstacle(model)
    return Plan("padded" if obstacle else "shared", obstacle, read_head(config), obstacle is None)


def output_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """The head of the bare model. Raises ValueError for one that is more than a weight and a bias."""
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"the output layer carries an adapter ({type(head).__name__}) that would be left out: take it from PEFT's "
            "target_modules"
        )
    return head


def sharing_obstacle(model: torch.nn.Module) -> str | None:
    """Why the trunk cannot run over a forest row, or None. Reads the config, runs nothing."""
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
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    if kinds & {"dynamic", "longrope"}:
        return f"{config.model_type} scales its rotary positions with the row's length ({', '.join(map(str, kinds))})"
    return None


def read_head(config) -> Head:
    """Scale and soft-cap of the logits, from the config's names for them."""
    text = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(text, name, None) or 1.0
    if getattr(text, "logits_scaling", None):
        scale /= text.logits_scaling
    elif getattr(text, "dim_model_base", None):
        scale /= text.hidden_size / text.dim_model_base
    softcaps = (getattr(text, n, None) for n in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))
    return Head(scale, next(filter(None, softcaps), None))


def prepare_model(
    model: torch.nn.Module, *, workspace_bytes: int = WORKSPACE_BYTES, backend: str | None = None
) -> Plan:
    """Give the bare model `model(forest=..., outputs=...)`; ordinary calls go on as before. Undo with `restore_model`.

    The forest call returns a dict: `token_logps` [N], the statistics named in `outputs` [N], and `aux_loss` of a
    mixture of experts when asked for with `aux_loss=True`. A few tokens are run through the model's own forward and
    through the new one: where sharing gives other numbers the model is padded instead (`plan.obstacle` says so).
    Raises ValueError where no path agrees with the model's own logits.
    """
    model = base_model(model)
    if hasattr(model, "_dpo_fast"):
        return model._dpo_fast["plan"]
    plan = plan_model(model)
    expected = None if plan.path == "segments" or _is_virtual(model) else _own_logps(model)
    _install(model, plan, workspace_bytes, backend)
    if expected is None:
        return plan
    problem = _probe(model, plan, expected)
    if problem and plan.path == "shared":
        restore_model(model)
        plan = dataclasses.replace(plan, path="padded", share=False, obstacle=problem)
        _install(model, plan, workspace_bytes, backend)
        problem = _probe(model, plan, expected)
    if problem:
        restore_model(model)
        raise ValueError(
            f"{type(model).__name__} computes its logits in a way that dpo_fast does not know ({problem}): "
            "its log-probs would be wrong"
        )
    return plan


_PROBE = ([5, 9, 3, 7], [[4, 8, 6], [11, 2, 10, 5]])  # a prompt and two completions


def _is_virtual(model) -> bool:
    return any(p.is_meta or hasattr(p, "full_tensor") for p in model.parameters())


def _own_logps(model) -> torch.Tensor:
    """Log-probs of the probe's completion tokens by the model's own forward, all [sum of lengths, V]."""
    prompt, completions = _PROBE
    rows = []
    with evaluating(model):
        for completion in completions:
            ids = torch.tensor([prompt + completion], device=next(model.parameters()).device)
            ids %= model.get_output_embeddings().weight.shape[0]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.double().log_softmax(-1))
    return torch.cat(rows)


def _probe(model, plan: Plan, expected: torch.Tensor) -> str | None:
    prompt, completions = _PROBE
    vocabulary = model.get_output_embeddings().weight.shape[0]
    prompt, completions = ([i % vocabulary for i in prompt], [[i % vocabulary for i in c] for c in completions])
    forest = PrefixForest.build([prompt] * 2, completions, share="prompt" if plan.share else "none")
    forest = forest.to(expected.device)
    try:
        with evaluating(model):
            # The model may still be on the CPU, where the back end of the run's device need not work.
            logps = model(forest=forest, backend=None)["token_logps"].double()
    except Exception as error:
        return f"its forward does not hand the forest on: {error}"
    picked = expected.gather(1, forest.targets[:, None])[:, 0]
    # Not down to the lowest: a model may forbid words with logits of -1e38.
    spread = (expected.amax() - expected.median()).item()
    # Half precision rounds, and a router may flip an expert; a wrong mask is off by several nats on a trained model.
    tolerance = (0.5 if next(model.parameters()).dtype in (torch.float16, torch.bfloat16) else 2e-3) * spread
    error = (logps - picked).abs().max().item()
    return None if error <= tolerance else f"log-probs differ by {error:.3g} from the model's own"


def _install(model, plan: Plan, workspace_bytes: int, backend: str | None) -> None:
    saved = {"plan": plan, "forward": model.__dict__.get("forward")}
    original = model.forward
    own = getattr(original, "__func__", None)
    if plan.path == "shared":
        attention.register()
        saved["attention"] = model.config._attn_implementation
        model.set_attn_implementation(attention.NAME)
    extra = {"plain_attention": True} if plan.path == "shared" else {}

    # `generate` reads the signature to know that it may pass position_ids and an attention_mask.
    @functools.wraps(type(model).forward)
    def forward(self, *args, forest: PrefixForest | None = None, outputs=(), aux_loss=False, backend=backend, **kwargs):
        if forest is None:
            # By way of self: in a deep copy, `original` is still bound to the first model.
            return (original if own is None else types.MethodType(own, self))(*args, **kwargs, **extra)
        hidden, router_logits = _trunk(self, forest, plan, aux_loss)
        head = output_layer(self)
        logps = linear_token_logps(
            hidden.index_select(0, forest.live_rows),
            head.weight,
            forest.targets,
            bias=getattr(head, "bias", None),
            logit_scale=plan.head.logit_scale,
            softcap=plan.head.softcap,
            outputs=tuple(outputs),
            grad_rows=forest.grad_items,
            workspace_bytes=workspace_bytes,
            backend=backend,
        )
        result = {"token_logps": logps[0], **logps[1]} if outputs else {"token_logps": logps}
        if aux_loss:
            result["aux_loss"] = _load_balancing_loss(self, forest, router_logits)
        return result

    model.forward = types.MethodType(forward, model)
    model._dpo_fast = saved


def restore_model(model: torch.nn.Module) -> None:
    """Undo `prepare_model`: the model's own forward and attention implementation."""
    model = base_model(model)
    saved = model.__dict__.pop("_dpo_fast", None)
    if saved is None:
        return
    if saved["forward"] is None:
        del model.forward
    else:
        model.forward = saved["forward"]
    if "attention" in saved:
        model.set_attn_implementation(saved["attention"])


def _trunk(model, forest: PrefixForest, plan: Plan, router: bool) -> tuple[torch.Tensor, tuple | None]:
    """Hidden states [T, D] of the forest's rows and, of a mixture of experts, router logits [T, E] a layer."""
    if plan.path == "segments":
        return _segments(model, forest, plan.share), None
    # base_model_prefix and get_decoder() may name a part that a causal LM of the family does not have (llama4_text).
    parts = getattr(model, model.base_model_prefix, None), model.get_decoder(), getattr(model, "model", None)
    trunk = next((part for part in parts if part is not None and part is not model), None)
    if trunk is None:
        raise ValueError(f"{type(model).__name__} has no trunk that dpo_fast can find")
    extra = {"output_router_logits": True} if router else {}
    if plan.path == "padded":
        rows, length, count = _padded_rows(forest)
        ids = forest.input_ids.new_zeros(count * length).index_copy(0, rows, forest.input_ids).view(count, length)
        mask = ids.new_zeros(count * length).index_fill(0, rows, 1).view(count, length)
        out = trunk(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
        hidden = out[0].flatten(0, 1).index_select(0, rows)
        logits = tuple(x.index_select(0, rows) for x in out.router_logits) if router else None
        return hidden, logits
    token = _on_forest.set(True)
    try:
        out = trunk(
            input_ids=forest.input_ids[None],
            position_ids=forest.position_ids[None],
            use_cache=False,
            forest=forest,
            **extra,
        )
    finally:
        _on_forest.reset(token)
    return out[0][0], out.router_logits if router else None


def _padded_rows(forest: PrefixForest) -> tuple[torch.Tensor, int, int]:
    """Where each row of an unshared forest lies in a padded [count, length] batch."""
    if any(parent >= 0 for parent in forest.parents):
        raise ValueError("this model computes whole sequences: build its forest with share='none'")
    count, length = len(forest.spans), forest.max_q
    segment = torch.repeat_interleave(
        torch.arange(count, device=forest.cu_q.device), forest.cu_q.diff().long(), output_size=forest.rows
    )
    return segment * length + forest.position_ids, length, count


def _segments(model, forest: PrefixForest, share: bool) -> torch.Tensor:
    states, hidden = [], []
    for (start, end), parent in zip(forest.spans, forest.parents, strict=True):
        if parent >= 0 and not share:
            raise ValueError("this model carries no state: build its forest with share='none'")
        state = states[parent] if parent >= 0 else None
        out, state = model.hidden_states(forest.input_ids[None, start:end], state)
        states.append(state)
        hidden.append(out[0])
    return torch.cat(hidden)


def _load_balancing_loss(model, forest: PrefixForest, router_logits) -> torch.Tensor:
    """The model's own auxiliary loss over the unshared tokens: a shared token counts once for each of its sequences."""
    if not forest.sequence_rows.numel():
        raise ValueError("the auxiliary loss counts every token: build the forest with keep_last=True")
    config = model.config.get_text_config()
    loss = sys.modules[type(model).__module__].load_balancing_loss_func
    experts = next(n for n in ("num_experts", "num_local_experts") if getattr(config, n, None))
    per_token = tuple(x.index_select(0, forest.sequence_rows) for x in router_logits)
    return loss(per_token, getattr(config, experts), config.num_experts_per_tok)


def has_aux_loss(model: torch.nn.Module) -> bool:
    """Whether the model has a router whose load-balancing loss can be computed."""
    model = base_model(model)
    config = getattr(model, "config", None)
    return (
        config is not None
        and hasattr(config.get_text_config(), "output_router_logits")
        and hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    )


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """Evaluation mode and no gradients, restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
