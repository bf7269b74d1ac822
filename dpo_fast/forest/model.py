"""A model's trunk over a prefix forest, and its head on the rows that predict a scored token, behind the model's `forward`.

`prepare_model(model)` gives `model(forest=...)` beside the model's ordinary call, inside the same `forward`, so that DDP,
FSDP, PEFT and autocast see one module call. The three ways through the trunk, and what a model does between trunk and
logits, are in gate.py; a short probe checks both when the model is prepared.
"""

import contextlib
import copy
import dataclasses
import functools
import sys
import types

import torch

from ..ops import WORKSPACE_BYTES, linear_token_logps
from . import attention
from .compiled import restore_parts, uncompiled
from .gate import Plan, base_model, computes_in_half, plan_model
from .head import head_weights, output_layer
from .packing import PrefixForest


def prepare_model(
    model: torch.nn.Module, *, workspace_bytes: int = WORKSPACE_BYTES, backend: str | None = None
) -> Plan:
    """Give the bare model the call `model(forest=..., outputs=...)`; ordinary calls stay as they are. `restore_model` undoes it.

    The forest call returns a dict: `token_logps` [N], the statistics named in `outputs` [N], and with `aux_loss=True` the
    `aux_loss` of a mixture of experts. A few tokens are run through the model's own forward and through the new one;
    where sharing gives other numbers the model is padded instead, and `plan.obstacle` says so. Raises ValueError where no
    path agrees with the model's own logits.
    """
    model = base_model(model)
    if hasattr(model, "_dpo_fast"):
        return model._dpo_fast["plan"]
    own_config(model)
    plan = plan_model(model)
    expected = None if plan.path == "segments" or _is_virtual(model) else _own_logps(model)
    if expected is None:
        _install(model, plan, workspace_bytes, backend)
        return plan
    padded = dataclasses.replace(plan, path="padded", share=False)
    problem = None
    for attempt in dict.fromkeys((plan, padded, dataclasses.replace(padded, attention="eager"))):
        plan = dataclasses.replace(attempt, obstacle=plan.obstacle or problem)
        _install(model, plan, workspace_bytes, backend)
        problem = _probe(model, plan, expected)
        if problem is None:
            return plan
        restore_model(model)
    raise ValueError(
        f"{type(model).__name__} computes its logits in a way that dpo_fast does not know ({problem}): "
        "its log-probs would be wrong"
    )


def own_config(model: torch.nn.Module) -> None:
    """Give the model a config of its own: the attention set for it must not reach other models that share the object."""
    if getattr(model, "config", None) is None:
        return
    copies: dict[int, object] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if id(value) in copies and hasattr(value, "to_dict"):
                setattr(module, name, copies[id(value)])


_PROBE = ([5, 9, 3, 7], [[4, 8, 6], [11, 2, 10, 5]])  # a prompt and two completions


def _is_virtual(model) -> bool:
    return any(p.is_meta or hasattr(p, "full_tensor") for p in model.parameters())


def _own_logps(model) -> torch.Tensor:
    """Log-probs of all words at the probe's completion tokens [sum of lengths, V], by the model's own forward.

    It runs with eager attention, since other implementations silently leave out what they lack, such as a soft-cap.
    """
    prompt, completions = _PROBE
    rows = []
    with evaluating(model), _attending(model, "eager"):
        for completion in completions:
            ids = torch.tensor([prompt + completion], device=next(model.parameters()).device)
            ids %= model.get_output_embeddings().weight.shape[0]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.double().log_softmax(-1))
    return torch.cat(rows)


@contextlib.contextmanager
def _attending(model, implementation: str):
    """Run the model with another attention implementation inside, where its class can change it."""
    before = model.config._attn_implementation
    change = before != implementation and model._can_set_attn_implementation()
    if change:
        model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        if change:
            model.set_attn_implementation(before)


def _probe(model, plan: Plan, expected: torch.Tensor) -> str | None:
    prompt, completions = _PROBE
    vocabulary = model.get_output_embeddings().weight.shape[0]
    prompt, completions = ([i % vocabulary for i in prompt], [[i % vocabulary for i in c] for c in completions])
    forest = PrefixForest.build([prompt] * 2, completions, share="prompt" if plan.share else "none")
    forest = forest.to(expected.device)
    try:
        with evaluating(model):
            # The model may still be on the CPU, where the back end that the run asks for may not work.
            logps = model(forest=forest, backend=None)["token_logps"].double()
    except Exception as error:
        return f"its forward does not hand the forest on: {error}"
    picked = expected.gather(1, forest.targets[:, None])[:, 0]
    # The median stands for the lower end, since a model may forbid words with logits of -1e38.
    spread = (expected.amax() - expected.median()).item()
    # Half precision rounds, and a router may pick another expert; a wrong mask is off by several nats on a trained model.
    tolerance = (0.5 if computes_in_half(model) else 2e-3) * spread
    error = (logps - picked).abs().max().item()
    return None if error <= tolerance else f"log-probs differ by {error:.3g} from the model's own"


def _install(model, plan: Plan, workspace_bytes: int, backend: str | None) -> None:
    saved = {"plan": plan, "forward": model.__dict__.get("forward")}
    original = model.forward
    own = getattr(original, "__func__", None)
    implementation = attention.NAME if plan.path == "shared" else plan.attention
    if implementation is not None:
        attention.register()
        saved["attention"] = model.config._attn_implementation
        model.set_attn_implementation(implementation)
    extra = {"plain_attention": True} if plan.path == "shared" else {}

    # `generate` reads the signature to learn that it may pass position_ids and an attention_mask.
    @functools.wraps(type(model).forward)
    def forward(self, *args, forest: PrefixForest | None = None, outputs=(), aux_loss=False, backend=backend, **kwargs):
        if forest is None:
            # The call goes through self: in a deep copy, `original` is still bound to the first model.
            call = original if own is None else types.MethodType(own, self)
            with uncompiled(self):
                return call(*args, **kwargs, **extra)
        hidden, router_logits = _trunk(self, forest, plan, aux_loss)
        weight, bias = head_weights(output_layer(self))
        if hasattr(weight, "full_tensor"):
            # FSDP2 casts what it gathers, and under PEFT it leaves a frozen head to the op, which gathers it.
            weight = weight.to(hidden.dtype)
        logps = linear_token_logps(
            hidden.index_select(0, forest.live_rows),
            weight,
            forest.targets,
            bias=bias,
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
    """Undo `prepare_model` and `compile_parts`: the model gets its own forward and attention implementation back."""
    model = base_model(model)
    restore_parts(model)
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
    """Hidden states [T, D] of the forest's rows and, where `router` asks for them, router logits [T, E] per layer."""
    if plan.path == "segments":
        return _segments(model, forest, plan.share), None
    # base_model_prefix and get_decoder() may name a part that this causal LM of the family does not have (llama4_text).
    parts = getattr(model, model.base_model_prefix, None), model.get_decoder(), getattr(model, "model", None)
    trunk = next((part for part in parts if part is not None and part is not model), None)
    if trunk is None:
        raise ValueError(f"{type(model).__name__} has no trunk that dpo_fast can find")
    extra = {"output_router_logits": True} if router else {}
    if plan.path == "padded":
        return _padded(trunk, forest, plan, extra)
    token = attention.ON_FOREST.set(True)
    try:
        out = trunk(
            input_ids=forest.input_ids[None],
            position_ids=forest.position_ids[None],
            # Without a mask transformers looks for packed sequences in the positions, on the host; this one says nothing.
            attention_mask=torch.ones_like(forest.input_ids, dtype=torch.bool)[None],
            use_cache=False,
            forest=forest,
            **extra,
        )
    finally:
        attention.ON_FOREST.reset(token)
    return out[0][0], out.router_logits if router else None


def _padded(trunk, forest: PrefixForest, plan: Plan, extra: dict) -> tuple[torch.Tensor, tuple | None]:
    """`_trunk` with one sequence per batch row; rows whose rotary frequencies differ go through the trunk separately."""
    if any(parent >= 0 for parent in forest.parents):
        raise ValueError("this model computes whole sequences: build its forest with share='none'")
    groups: dict[tuple, list[int]] = {}
    # The last token of a sequence predicts nothing and has no row, yet it counts where frequencies depend on the length.
    unseen = int(bool(plan.regimes) and not forest.sequence_rows.numel())
    for k, (start, end) in enumerate(forest.spans):
        groups.setdefault(tuple(r.of(end - start + unseen) for r in plan.regimes), []).append(k)
    order, hidden, router = [], [], []
    for members in groups.values():
        if plan.regimes:
            reset_rope(trunk)
        length = max(forest.spans[k][1] - forest.spans[k][0] for k in members) + unseen
        rows, cells = _cells(forest, members, length)
        ids = forest.input_ids.new_zeros(len(members) * length)
        mask = ids.index_fill(0, cells, 1).view(-1, length)
        ids = ids.index_copy(0, cells, forest.input_ids[rows]).view(-1, length)
        out = trunk(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
        order.append(rows)
        hidden.append(out[0].flatten(0, 1).index_select(0, cells))
        router.append([x.index_select(0, cells) for x in out.router_logits] if extra else [])
    back = torch.cat(order).argsort()
    logits = tuple(torch.cat(layer).index_select(0, back) for layer in zip(*router, strict=True)) if extra else None
    return torch.cat(hidden).index_select(0, back), logits


def _cells(forest: PrefixForest, members: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the segments `members`, and their places in the flattened padded batch [len(members), length]."""
    rows = torch.cat([torch.arange(*forest.spans[k]) for k in members])
    cells = torch.cat([torch.arange(e - s) + i * length for i, (s, e) in enumerate(forest.spans[k] for k in members)])
    device = forest.input_ids.device
    return rows.to(device), cells.to(device)


def reset_rope(model: torch.nn.Module) -> None:
    """Reset the rotary frequencies to those before the first row: `dynamic` ones stay those of the longest row seen."""
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                setattr(module, name.replace("original_inv_freq", "inv_freq"), buffer.clone())


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
    """The model's own auxiliary loss over all tokens of all sequences: a shared token counts once per sequence."""
    if not forest.sequence_rows.numel():
        raise ValueError("the auxiliary loss counts every token: build the forest with keep_last=True")
    config = model.config.get_text_config()
    loss = sys.modules[type(model).__module__].load_balancing_loss_func
    experts = next(n for n in ("num_experts", "num_local_experts") if getattr(config, n, None))
    per_token = tuple(x.index_select(0, forest.sequence_rows) for x in router_logits)
    return loss(per_token, getattr(config, experts), config.num_experts_per_tok)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """Run in evaluation mode without gradients; the modules' modes are restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
