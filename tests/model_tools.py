"""A batch of token ids in five pairs, a model's own log-probs and gradients for it, those of the forest, and how they are compared."""

import torch
from peft import LoraConfig, get_peft_model

from dpo_fast.forest import gate
from dpo_fast.forest.packing import PrefixForest
from dpo_fast.losses import preference_loss

A, B = [5, 17, 33, 8, 40, 21, 7, 50, 12], [44, 3, 29]
LONG = [*range(20, 37)]
# Five pairs, among them responses with a common beginning, a one-token completion, two equal responses, and two prompts
# with a long common beginning.
PAIRS = [
    (A, [5, 6, 7, 8, 9, 10], [5, 6, 20, 21, 3]),
    (B, [11, 12], [30, 31, 4, 9]),
    (A, [5], [50, 51]),
    ([*LONG, 4], [9, 9, 8], [9, 9, 8]),
    ([*LONG, 6, 7], [5, 8], [10]),
]
PROMPTS = [p for p, _, _ in PAIRS] * 2
COMPLETIONS = [c for _, c, _ in PAIRS] + [r for _, _, r in PAIRS]


def coefficients():
    """A weight for every token of every sequence [S, C], so that no error of one token can hide in a sum."""
    longest = max(map(len, COMPLETIONS))
    return torch.randn(len(PROMPTS), longest, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def objective(paths):
    """A DPO loss on sequence sums, and a weighted sum of every token's log-prob; paths [S, C]."""
    chosen, rejected = paths.sum(1).view(2, -1)
    dpo = preference_loss(chosen, rejected, chosen.detach() + 1, rejected.detach(), beta=0.3).loss
    return dpo + (paths * coefficients()).sum()


def own_paths(model, prompts=PROMPTS, completions=COMPLETIONS):
    """Token log-probs [S, C] by the model's own forward, one sequence at a time."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion])
        logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        picked = logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        rows.append(torch.nn.functional.pad(picked, (0, max(map(len, completions)) - len(completion))))
    return torch.stack(rows)


def forest_paths(model, share, keep_last=False, **options):
    forest = PrefixForest.build(PROMPTS, COMPLETIONS, share=share, keep_last=keep_last)
    return forest.gather_paths(model(forest=forest, **options)["token_logps"])


def gradients(model, loss):
    """Gradients by name; zero where a parameter has no part (an expert that nobody chose)."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


def agree(ours, theirs, rtol=1e-9):
    """(paths, gradients) equal to `rtol` of each tensor's largest entry."""
    scale = max(g.abs().max() for g in theirs[1].values())
    assert (ours[0] - theirs[0]).abs().max() <= rtol * theirs[0].abs().max()
    assert ours[1].keys() == theirs[1].keys()
    for name, g in theirs[1].items():
        error = (ours[1][name] - g).abs().max()
        # A gradient that is zero by symmetry (a key's bias) is rounding noise of the others.
        assert error <= rtol * g.abs().max() + 1e-13 * scale, (name, error.item(), g.abs().max().item())


def paths_and_gradients(model, paths):
    return paths.detach(), gradients(model, objective(paths))


def force_padding(monkeypatch):
    monkeypatch.setattr(gate, "sharing_obstacle", lambda model: "the test says so")


EXAMPLE = {"prompt_ids": [7, *A * 3], "chosen_ids": [5, 6, 7] * 10, "rejected_ids": [5, 6, 8, 9]}


def with_lora(model, **options):
    config = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **options})
    wrapped = get_peft_model(model, config).double().eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=rng, dtype=p.dtype) * 0.3)
    return wrapped
