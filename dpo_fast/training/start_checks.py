"""Two checks before a run spends its time: sharing changes nothing, and the policy starts at the reference."""

import logging
import math

import torch

from ..forest.gate import Plan, base_model
from ..forest.model import evaluating
from ..forest.packing import PrefixForest

logger = logging.getLogger(__name__)


def verify_sharing(model: torch.nn.Module, plan: Plan, example: dict, share: str) -> float:
    """Largest difference of a token's log-prob, shared against the model's own forward, on a slice of one pair (nats).

    The slice is at most 64 prompt and 32 completion tokens. Raises ValueError where the two disagree.
    """
    model = base_model(model)
    prompt, completions = example["prompt_ids"][-64:], [example["chosen_ids"][:32], example["rejected_ids"][:32]]
    parameter = next(model.parameters())
    forest = PrefixForest.build([prompt] * 2, completions, share=share).to(parameter.device)
    differences = [torch.zeros(1, dtype=torch.float64, device=parameter.device)]
    with evaluating(model), torch.autocast(parameter.device.type, enabled=False):
        # Any back end: a model that FSDP will move is still on the CPU.
        ours = forest.gather_paths(model(forest=forest, backend=None)["token_logps"]).double()
        for s, completion in enumerate(completions):
            ids = torch.tensor([prompt + completion], device=parameter.device)
            if plan.path == "segments":
                hidden, _ = model.hidden_states(ids)
                head = model.get_output_embeddings()
                logits = torch.nn.functional.linear(hidden[0], head.weight, getattr(head, "bias", None))
            else:
                logits = model(input_ids=ids, use_cache=False).logits[0]
            scored = int(forest.lengths[s])
            logps = logits[-scored - 1 : -1].double().log_softmax(-1)
            theirs = logps.gather(1, ids[0, ids.shape[1] - scored :, None])[:, 0]
            differences.append((ours[s, :scored] - theirs).abs())
    worst = torch.cat(differences).max().item()
    tolerance = 1e-3 if parameter.dtype in (torch.float32, torch.float64) else 0.5
    if not worst <= tolerance:
        raise ValueError(
            f"verification failed: a token's log-prob differs by {worst:.3g} nats between share={share!r} and the "
            f"model's own forward ({plan.path} path). Train with --share none, and please report the model"
        )
    return worst


def check_start(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, low_precision: bool) -> bool:
    """Whether policy and reference agree before the first step: `|beta * margin| < 2e-4`, i.e. loss ln 2 within 1e-4.

    In half precision the sums of log-probs are rounded differently in every batch: 0.1 there. Says so when they differ.
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
