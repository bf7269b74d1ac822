"""Losses as modules, for your own loop, Lightning or Fabric: the constructor takes options, the call takes tensors.

loss = DPOLoss(beta=0.1)(logits, targets, ref_logps).loss                      # logits that exist already
loss = LinearDPOLoss(beta=0.1)(hidden, lm_head.weight, targets, ref_logps).loss  # the head included
"""

from torch import Tensor, nn

from ..losses import LossOptions, PreferenceOutput
from ..ops import dpo_loss, linear_dpo_loss


class _Loss(nn.Module):
    def __init__(self, **options):
        """Take the options of the op that this module calls. Raises ValueError for options of a loss that cannot work."""
        super().__init__()
        fields = {name: value for name, value in options.items() if name in LossOptions.__dataclass_fields__}
        LossOptions(**fields).check()
        self.options = options

    def extra_repr(self) -> str:
        """The options, which `print` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DPOLoss(_Loss):
    """`dpo_fast.dpo_loss` with its options fixed: `DPOLoss(loss_type="ipo", beta=0.1)(logits, targets, ref_logps)`."""

    def forward(
        self, logits: Tensor, targets: Tensor, ref_logps: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> PreferenceOutput:
        """logits [2B, T, V] and targets [2B, T], or packed with `cu_seqlens` [2B + 1]; ref_logps [2B]. See `dpo_loss`."""
        return dpo_loss(logits, targets, ref_logps, cu_seqlens=cu_seqlens, **self.options)


class LinearDPOLoss(_Loss):
    """`dpo_fast.linear_dpo_loss` with its options fixed; the `[N, V]` logits never exist."""

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> PreferenceOutput:
        """hidden [2B, T, D], weight [V, D], targets [2B, T], or packed with `cu_seqlens`. See `linear_dpo_loss`."""
        return linear_dpo_loss(hidden, weight, targets, ref_logps, cu_seqlens=cu_seqlens, bias=bias, **self.options)
