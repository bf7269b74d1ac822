"""A model's trunk over a prefix forest and its head on the scored rows, behind the model's own `forward`.

`prepare_model(model)` gives `model(forest=...)` beside the model's ordinary call, inside the same `forward`, so that DDP,
FSDP, PEFT and autocast see one module call. The three ways through the trunk, and what a model does between trunk and
logits, are in gate.py; a short probe checks both when the model is prepared.
"""

import contextlib
import dataclasses
import functools
import sys
import types

import torch

from ..ops import WORKSPACE_BYTES, linear_token_logps
from . import attention
from .gate import Plan, base_model, output_layer, plan_model
from .packing import PrefixForest


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
            ignore_index=None,
            logit_scale=plan.logits.logit_scale,
            softcap=plan.logits.softcap,
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
    token = attention.ON_FOREST.set(True)
    try:
        out = trunk(
            input_ids=forest.input_ids[None],
            position_ids=forest.position_ids[None],
            use_cache=False,
            forest=forest,
            **extra,
        )
    finally:
        attention.ON_FOREST.reset(token)
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
