"""Checks before a run spends its time: the weights are finite, the rows fit the model's positions, sharing changes no
log-prob, and the policy starts at the reference."""

import inspect
import logging
import math
from collections.abc import Mapping

import numpy as np
import torch

from ..data.examples import FIELDS
from ..data.pairs import PairDataset
from ..data.streamed import StreamedPairs
from ..forest.gate import Plan, base_model, computes_in_half, rope_parameters
from ..forest.model import evaluating, reset_rope
from ..forest.packing import PrefixForest
from .quantised import is_quantised

logger = logging.getLogger(__name__)
_PROMPT, _SCORED = 64, 32  # tokens that a check looks at


def check_finite(model: torch.nn.Module) -> None:
    """Raise ValueError that names the first parameter or buffer of `model` that holds NaN or an infinite number."""
    for name, tensor in model.named_parameters():
        if is_quantised(tensor):
            continue
        # The sum comes first since it reads without writing; it may overflow although every number is finite.
        if not tensor.is_meta and not tensor.detach().sum().isfinite():
            bad = int((~tensor.detach().isfinite()).sum())
            if bad:
                raise ValueError(
                    f"the model's weight {name} holds {bad} of {tensor.numel()} numbers that are NaN or infinite: its file "
                    "is damaged, or the run that wrote it diverged"
                )


def check_positions(model: torch.nn.Module, data: dict[str, PairDataset]) -> None:
    """Raise ValueError for rows with more tokens than the model has positions (learned, or rotary without scaling)."""
    if getattr(model, "config", None) is None or not hasattr(model.config, "get_text_config"):
        return
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    name, limit = next(((n, v) for n in names if isinstance(v := getattr(config, n, None), int)), (None, None))
    ropes = rope_parameters(config)
    plain = bool(ropes) and all(rope.get("rope_type", "default") == "default" for rope in ropes)
    if limit is None or not (plain or _learns_positions(model)):
        return
    for part, rows in data.items():
        if isinstance(rows, StreamedPairs) and (rows.max_length is None or rows.max_length > limit):
            raise ValueError(
                f"the {part} data is streamed, and the model has {limit} positions ({name}): set max_length to {limit} at most"
            )
        lengths = np.maximum(*rows.examples.sequence_lengths())
        long = np.flatnonzero(lengths > limit)
        if len(long):
            raise ValueError(
                f"{len(long)} pairs of the {part} data have more tokens than the model has positions ({name}={limit}; pair "
                f"{long[0]} has {lengths[long[0]]}): set max_length to {limit} at most"
            )


def _learns_positions(model) -> bool:
    parts = ("wpe", "pos", "position")
    return any(
        isinstance(module, torch.nn.Embedding) and any(part in name.rpartition(".")[2] for part in parts)
        for name, module in model.named_modules()
    )


def verify_start(model: torch.nn.Module, plan: Plan, data: PairDataset, share: str, deterministic: bool) -> None:
    """Check the model as the run will use it, on rows of the run: log-probs against its own forward, and no dropout.

    A shared model sees a slice of the first pair; a padded one sees the longest pair of the data beside the shortest, slices
    too unless its positions depend on the row's length. Only the last tokens are scored, so that a long row makes few logits.
    With `deterministic`, two passes in training mode must give the same numbers. Raises ValueError where a check fails.
    """
    examples = data.examples
    if plan.path == "padded":
        size = sum(examples.lengths(name) for name in FIELDS)
        last = len(size) - 1 - int(size[::-1].argmax())
        rows = [_as_lists(examples[i]) for i in dict.fromkeys((last, int(size.argmin())))]
        rows = [_last_scored(e) if plan.regimes else _slice(e) for e in rows]
    else:
        rows = [_slice(_as_lists(examples[0]))]
    verify_sharing(model, plan, rows, share)
    verify_training_mode(model, rows, share, deterministic)


def _as_lists(example: Mapping) -> dict:
    return {name: ids.tolist() for name, ids in example.items() if name in (*FIELDS, "rejected_prompt_ids")}


def _slice(example: dict) -> dict:
    return {
        "prompt_ids": example["prompt_ids"][-_PROMPT:],
        **{side: example[side][:_SCORED] for side in ("chosen_ids", "rejected_ids")},
    }


def _last_scored(example: dict) -> dict:
    """The same two sequences, of whose completions all but the last tokens count as prompt."""
    prompts = {"chosen_ids": example["prompt_ids"]}
    prompts["rejected_ids"] = example.get("rejected_prompt_ids", example["prompt_ids"])
    before = {side: [*prompts[side], *example[side][:-_SCORED]] for side in prompts}
    last = {side: example[side][-_SCORED:] for side in prompts}
    return {"prompt_ids": before["chosen_ids"], "rejected_prompt_ids": before["rejected_ids"], **last}


def verify_sharing(model: torch.nn.Module, plan: Plan, rows: list[dict], share: str) -> float:
    """Compare log-probs of `rows` in one forest with the model's own forward of each sequence.

    Returns the largest difference of a token's log-prob in nats. Raises ValueError where it is more than rounding.
    """
    model = base_model(model)
    parameter = next(model.parameters())
    forest = PrefixForest.from_pairs(rows, share=share).to(parameter.device)
    sequences = [(e["prompt_ids"], e["chosen_ids"]) for e in rows]
    sequences += [(e.get("rejected_prompt_ids", e["prompt_ids"]), e["rejected_ids"]) for e in rows]
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    differences = [torch.zeros(1, dtype=torch.float64, device=parameter.device)]
    with evaluating(model), torch.autocast(parameter.device.type, enabled=False):
        # Any back end will do: a model that FSDP will move is still on the CPU.
        ours = forest.gather_paths(model(forest=forest, backend=None)["token_logps"]).double()
        for s, (prompt, completion) in enumerate(sequences):
            ids, scored = torch.tensor([[*prompt, *completion]], device=parameter.device), int(forest.lengths[s])
            if plan.path == "segments":
                hidden, _ = model.hidden_states(ids)
                head = model.get_output_embeddings()
                logits = torch.nn.functional.linear(hidden[0], head.weight, getattr(head, "bias", None))
            else:
                if plan.regimes:
                    reset_rope(model)
                extra = {"logits_to_keep": scored + 1} if few else {}
                # Compiled layers are compared with the model as it is: an ordinary call runs uncompiled.
                logits = model(input_ids=ids, use_cache=False, **extra).logits[0]
            logps = logits[-scored - 1 : -1].double().log_softmax(-1)
            theirs = logps.gather(1, ids[0, ids.shape[1] - scored :, None])[:, 0]
            differences.append((ours[s, :scored] - theirs).abs())
    worst = torch.cat(differences).max().item()
    tolerance = 0.5 if computes_in_half(model) else 1e-3
    if not worst <= tolerance:
        advice = "Train with --share none, and please" if plan.path == "shared" else "Please"
        raise ValueError(
            f"verification failed: a token's log-prob differs by {worst:.3g} nats between share={share!r} and the "
            f"model's own forward ({plan.path} path). {advice} report the model"
        )
    return worst


def verify_training_mode(model: torch.nn.Module, rows: list[dict], share: str, deterministic: bool = True) -> float:
    """Compare two passes in training mode without gradients, which may differ by rounding only.

    Returns the largest difference in nats. Raises ValueError where a model draws random numbers although dropout is off
    (`deterministic`), and whatever the model itself raises in training mode.
    """
    bare = base_model(model)
    parameter = next(bare.parameters())
    forest = PrefixForest.from_pairs(rows, share=share).to(parameter.device)
    modes = {module: module.training for module in model.modules()}
    state = torch.get_rng_state()
    model.train()
    try:
        with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            first, second = (bare(forest=forest, backend=None)["token_logps"].double() for _ in range(2))
    finally:
        torch.set_rng_state(state)
        for module, mode in modes.items():
            module.training = mode
    worst = (first - second).abs().max().item()
    # Sums of atomics may round differently on a GPU; a dropped activation moves a log-prob by tenths of a nat.
    if deterministic and not worst <= (0.02 if computes_in_half(bare) else 1e-4):
        raise ValueError(
            f"two passes in training mode differ by {worst:.3g} nats although disable_dropout is on: "
            f"{type(bare).__name__} draws random numbers that no dropout option turns off. Train with "
            "disable_dropout=False to accept its noise"
        )
    return worst


def check_start(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, low_precision: bool) -> bool:
    """Whether policy and reference agree before the first step: `|beta * margin| < 2e-4`, i.e. loss ln 2 within 1e-4.

    In half precision the limit is 0.1, since sums of log-probs are rounded differently in every batch. A warning says so
    when they differ.
    """
    margin = (chosen_rewards - rejected_rewards).abs().max().item()
    if margin < (0.1 if low_precision else 2e-4):
        return True
    logger.warning(
        "policy and reference differ before the first step: a pair's reward margin is %.3g instead of 0 (a sigmoid loss "
        "would be off ln 2 = %.4f by up to %.1g). Is the reference of another precision, or dropout on?",
        margin,
        math.log(2),
        margin / 2,
    )
    return False
