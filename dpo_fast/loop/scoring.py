"""Log-probs of pairs under a model, and the implicit reward margin of a policy against its reference.

The implicit reward of a completion is log p(completion | prompt) under the policy minus that under the reference (DPO,
arXiv 2305.18290, equation 5, without beta). Pairs run through the prefix forest as in training.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.tokenization import tokenize_pairs
from ..forest.batch import ForestCollator
from ..forest.model import evaluating, prepare_model

MAX_TOKENS = 4096  # per forward pass


def pair_logps(
    model: torch.nn.Module, examples: Sequence[dict], *, average: bool = False, max_tokens: int = MAX_TOKENS
) -> torch.Tensor:
    """Log-probs [B, 2] (float64, nats) of `chosen_ids` and `rejected_ids`, summed or, with `average`, per token.

    examples   mappings with `prompt_ids`, `chosen_ids`, `rejected_ids`
    """
    plan = prepare_model(model)
    device = next(model.parameters()).device
    collator = ForestCollator(share="prefix" if plan.share else "none", max_tokens=max_tokens)
    rows = []
    with evaluating(model):
        for group in collator.split(examples):
            forest = collator.part(group).forest.to(device)
            logps = forest.sum_paths(model(forest=forest)["token_logps"].double())
            logps = logps / forest.lengths.view(2, -1) if average else logps
            rows.append(logps.view(2, len(group)).T.cpu())
    return torch.cat(rows)


def implicit_margins(
    policy: torch.nn.Module,
    reference: torch.nn.Module | None,
    tokenizer,
    rows: Sequence[dict],
    *,
    average: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> torch.Tensor:
    """How much more the policy favours `chosen` over `rejected` than its reference does, [B] in nats (float64).

    rows        prompt, chosen and rejected as text or messages
    reference   a model, or None for the policy with its adapters switched off

    Raises ValueError for a row that cannot be tokenised, without a reference, and for a margin that is not finite.
    """
    examples = tokenize_pairs(list(rows), tokenizer, max_length=None, log=lambda _: None).examples
    options = {"average": average, "max_tokens": max_tokens}
    ours = pair_logps(policy, examples, **options)
    if reference is None and not hasattr(policy, "disable_adapter"):
        raise ValueError("a policy without adapters needs a reference model")
    with policy.disable_adapter() if reference is None else contextlib.nullcontext():
        theirs = pair_logps(policy if reference is None else reference, examples, **options)
    margins = (ours - theirs) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    if not margins.isfinite().all():
        raise ValueError(f"the policy gives row {int((~margins.isfinite()).nonzero()[0])} a margin that is not finite")
    return margins


def load_policy(spec: str) -> tuple[torch.nn.Module, torch.nn.Module | None, object]:
    """Policy, reference (None: the policy without its adapters) and tokenizer of "RUN" or "RUN#REFERENCE".

    RUN is a folder with adapters or a whole model; a whole model needs the reference's folder or hub name.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _, reference = spec.partition("#")
    if not Path(run).is_dir():
        raise FileNotFoundError(f"no such model folder: {run} (absolute: {Path(run).absolute()})")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(name):
        return AutoModelForCausalLM.from_pretrained(name, dtype="float32").to(device)

    adapters = (Path(run) / "adapter_config.json").exists()
    if adapters and reference:
        raise ValueError(f"{run} holds adapters, so its reference is the model under them: leave #{reference} out")
    if not adapters and not reference:
        raise ValueError(f"{run} holds a whole model: say what it was trained from, as in {run}#REFERENCE")
    if adapters:
        from peft import PeftConfig, PeftModel

        policy = PeftModel.from_pretrained(load(PeftConfig.from_pretrained(run).base_model_name_or_path), run).to(
            device
        )
    else:
        policy = load(run)
    return policy, load(reference) if reference else None, AutoTokenizer.from_pretrained(run)
