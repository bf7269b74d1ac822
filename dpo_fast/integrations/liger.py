"""Liger's fused preference losses, with Liger's signatures and results, on `linear_sequence_logps`.

    from dpo_fast.integrations.liger import LigerFusedLinearDPOLoss     # instead of liger_kernel.chunked_loss

The differences are: ignored rows stay out of the head on a CPU, log-probs are float32 and exact, `sigmoid` honours
`label_smoothing`, and `compiled` and `chunk_size` have no effect (they are accepted for the signature's sake).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loss_table import log_odds
from ..losses import preference_loss, require
from ..ops import linear_sequence_logps
from ..ops.arguments import local


def _logits_means(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean logit of the chosen and of the rejected half over all positions and words, computed without the logits."""
    with torch.no_grad():
        word = weight.float().mean(0)
        shift = 0.0 if bias is None else bias.float().mean()
        chosen, rejected = (half.float().mean((0, 1)) @ word + shift for half in hidden.chunk(2))
    return chosen, rejected


class _Preference(nn.Module):
    """A loss of chosen and rejected log-probs, plus `alpha` times the negative log-likelihood of the chosen tokens."""

    average_log_prob = True
    use_ref_model = False
    alpha = 1.0

    def _preference(self, chosen: Tensor, rejected: Tensor, references: tuple) -> tuple[Tensor, ...]:
        """The loss, and the numbers that Liger returns after the common ones."""
        raise NotImplementedError

    def _run(self, weight, hidden, target, bias=None, reference=(None, None, None), nll_target=None):
        require(
            hidden.ndim == 3 and target.shape == hidden.shape[:2] and len(target) % 2 == 0,
            lambda: (
                f"_input must be [2B, T, D] and target [2B, T], the B chosen first, got {list(hidden.shape)} and "
                f"{list(target.shape)}"
            ),
        )
        weight, bias = local("weight", weight), local("bias", bias)
        options = {"average": self.average_log_prob, "ignore_index": self.ignore_index}
        logps = linear_sequence_logps(hidden, weight, target, bias=bias, **options)
        chosen, rejected = logps.chunk(2)
        references = (None, None)
        if self.use_ref_model:
            ref_hidden, ref_weight, ref_bias = reference
            given = ref_hidden is not None and ref_weight is not None
            require(given, lambda: "use_ref_model=True needs ref_input and ref_weight")
            with torch.no_grad():
                references = linear_sequence_logps(ref_hidden, ref_weight, target, bias=ref_bias, **options).chunk(2)
        loss, *others = self._preference(chosen, rejected, references)
        nll = torch.zeros((), device=hidden.device)
        if self.compute_nll_loss:
            half = len(target) // 2
            scored = (target[:half] if nll_target is None else nll_target[:half]) != self.ignore_index
            if nll_target is None:
                summed = chosen * scored.sum(1).clamp(min=1) if self.average_log_prob else chosen
            else:
                summed = linear_sequence_logps(
                    hidden[:half], weight, nll_target[:half], bias=bias, ignore_index=self.ignore_index
                )
            nll = -summed.sum() / scored.sum()
            loss = loss + self.alpha * nll
        means = _logits_means(hidden, weight, bias)
        common = (chosen.detach(), rejected.detach(), *means, nll.detach())
        return loss, (*common, *(x.detach() for x in others))


class LigerFusedLinearDPOLoss(_Preference):
    """Liger 0.8's class of that name: `loss, metrics = LigerFusedLinearDPOLoss(beta=0.1)(weight, hidden, target, ...)`."""

    _SUPPORTED_LOSS_TYPES = frozenset(
        (
            "sigmoid",
            "hinge",
            "exo_pair",
            "nca_pair",
            "robust",
            "bco_pair",
            "sppo_hard",
            "apo_zero",
            "apo_down",
            "discopop",
        )
    )

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__()
        require(
            loss_type in self._SUPPORTED_LOSS_TYPES,
            lambda: f"Unsupported loss_type: {loss_type}. Supported types are: {sorted(self._SUPPORTED_LOSS_TYPES)}",
        )
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.loss_type, self.label_smoothing, self.discopop_tau = loss_type, label_smoothing, discopop_tau
        one = torch.zeros(1)
        self._preference(one, one, (one, one))  # this call refuses options that cannot work

    def _preference(self, chosen, rejected, references):
        options = {"loss_type": self.loss_type, "beta": self.beta, "label_smoothing": self.label_smoothing}
        out = preference_loss(chosen, rejected, *references, discopop_tau=self.discopop_tau, **options)
        return out.loss, out.chosen_rewards, out.rejected_rewards

    def forward(self, lin_weight, _input, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None):
        """Weight [V, D], hidden [2B, T, D], target [2B, T] -> the loss, and detached (chosen and rejected log-probs [B], their
        mean logits, nll_loss, chosen and rejected rewards [B])."""
        return self._run(lin_weight, _input, target, bias, (ref_input, ref_weight, ref_bias))


class LigerFusedLinearCPOLoss(_Preference):
    """CPO, arXiv 2401.08417, which has no reference."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.label_smoothing, self.average_log_prob = label_smoothing, average_log_prob

    def _preference(self, chosen, rejected, references):
        out = preference_loss(chosen, rejected, beta=self.beta, label_smoothing=self.label_smoothing)
        return out.loss, out.chosen_rewards, out.rejected_rewards

    def forward(self, lin_weight, _input, target, bias=None):
        """As `LigerFusedLinearDPOLoss.forward`, without a reference."""
        return self._run(lin_weight, _input, target, bias)


class LigerFusedLinearSimPOLoss(_Preference):
    """SimPO, arXiv 2405.14734, on means over tokens."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.label_smoothing, self.gamma = label_smoothing, gamma

    def _preference(self, chosen, rejected, references):
        one = torch.ones_like(chosen)  # the log-probs are means already
        options = {"beta": self.beta, "label_smoothing": self.label_smoothing, "simpo_gamma": self.gamma}
        out = preference_loss(chosen, rejected, loss_type="simpo", chosen_lengths=one, rejected_lengths=one, **options)
        return out.loss, out.chosen_rewards, out.rejected_rewards

    def forward(self, lin_weight, _input, target, bias=None):
        """As `LigerFusedLinearDPOLoss.forward`, without a reference."""
        return self._run(lin_weight, _input, target, bias)


class LigerFusedLinearORPOLoss(_Preference):
    """ORPO, arXiv 2403.07691, on means over tokens; its last two numbers are the mean log odds ratio and log odds."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss

    def _preference(self, chosen, rejected, references):
        odds = log_odds(chosen) - log_odds(rejected)
        ratio = F.logsigmoid(odds)
        return -self.beta * ratio.mean(), self.beta * chosen, self.beta * rejected, ratio.mean(), odds.mean()

    def forward(self, lin_weight, _input, target, bias=None, nll_target=None):
        """As `LigerFusedLinearDPOLoss.forward`, without a reference; `nll_target` [2B, T] replaces target in nll_loss."""
        return self._run(lin_weight, _input, target, bias, nll_target=nll_target)


# Liger's functional forms: hidden first, then the weight, and the options in Liger's order.


def liger_fused_linear_dpo(
    _input, weight, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None, ignore_index=-100, beta=0.1,
    compute_nll_loss=False, compiled=True, use_ref_model=True, average_log_prob=False, chunk_size=1,
    loss_type="sigmoid", label_smoothing=0.0, discopop_tau=0.05, alpha=1.0,
):  # fmt: skip
    """`LigerFusedLinearDPOLoss` as a function."""
    loss = LigerFusedLinearDPOLoss(
        ignore_index, beta, alpha, compute_nll_loss, compiled, use_ref_model, average_log_prob, chunk_size, loss_type,
        label_smoothing, discopop_tau,
    )  # fmt: skip
    return loss(weight, _input, target, bias, ref_input, ref_weight, ref_bias)


def liger_fused_linear_cpo(
    _input, weight, target, bias=None, ignore_index=-100, beta=0.1, alpha=1.0, label_smoothing=0.0,
    compute_nll_loss=True, compiled=True, average_log_prob=False, chunk_size=1,
):  # fmt: skip
    """`LigerFusedLinearCPOLoss` as a function."""
    loss = LigerFusedLinearCPOLoss(
        ignore_index, beta, alpha, label_smoothing, compute_nll_loss, compiled, average_log_prob, chunk_size
    )
    return loss(weight, _input, target, bias)


def liger_fused_linear_simpo(
    _input, weight, target, bias=None, ignore_index=-100, beta=0.1, alpha=1.0, label_smoothing=0.0,
    compute_nll_loss=False, compiled=True, gamma=0.5, chunk_size=1,
):  # fmt: skip
    """`LigerFusedLinearSimPOLoss` as a function."""
    loss = LigerFusedLinearSimPOLoss(ignore_index, beta, alpha, label_smoothing, compute_nll_loss, compiled, gamma)
    return loss(weight, _input, target, bias)


def liger_fused_linear_orpo(
    _input, weight, target, bias=None, ignore_index=-100, beta=0.1, compute_nll_loss=True, nll_target=None,
    compiled=True, chunk_size=1,
):  # fmt: skip
    """`LigerFusedLinearORPOLoss` as a function."""
    loss = LigerFusedLinearORPOLoss(ignore_index, beta, compute_nll_loss, compiled, chunk_size)
    return loss(weight, _input, target, bias, nll_target)
