"""Ours in the place of Liger's fused DPO loss: only the import line changes. python examples/liger_loss.py"""

import torch

from dpo_fast.integrations.liger import LigerFusedLinearDPOLoss  # was: from liger_kernel.chunked_loss import ...

torch.manual_seed(0)
hidden, weight = torch.randn(4, 10, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
target = torch.randint(100, (4, 10))
target[:, :5] = -100
loss, (chosen_logps, rejected_logps, *_) = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=True)(
    weight, hidden, target, ref_input=hidden.detach(), ref_weight=weight.detach()
)
loss.backward()
print(f"loss {loss.item():.4f}, gradient of the head {weight.grad.norm().item():.4f}")
