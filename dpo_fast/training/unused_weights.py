"""Whether a step may leave a trained weight without a gradient: DistributedDataParallel must look for such weights then.

Looking takes a walk over the graph and one more reduction in every step; not looking where it is needed ends the second
step with an error. Most decoders use every weight in every step.
"""

import torch

from ..forest.gate import base_model


def may_stay_unused(model: torch.nn.Module) -> bool:
    """True for experts that are modules of their own, each of which a step may pass by (one tensor of all experts is
    used whenever one of them is), for weights beside the text decoder and its head (a vision tower), and for models
    that do not name their decoder."""
    bare = base_model(model)
    if not (hasattr(bare, "get_decoder") and hasattr(bare, "get_output_embeddings")):
        return True
    used = {
        id(p)
        for part in (bare.get_decoder(), bare.get_output_embeddings())
        if part is not None
        for p in part.parameters()
    }
    if any(p.requires_grad and id(p) not in used for p in bare.parameters()):
        return True
    lists = (torch.nn.ModuleList, torch.nn.ModuleDict)
    experts = [m for name, m in bare.named_modules() if isinstance(m, lists) and "expert" in name.rpartition(".")[2]]
    return any(p.requires_grad for module in experts for p in module.parameters())
