"""The preference objective on sequence log-probs: its options, their checks, its gradient. The formulas are in loss_table.py.

Everything here works on [B] or [S] log-probs in nats, in float32 or wider, and never waits for the device. No logits,
no model, no kernels.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .loss_table import BOTH_LENGTHS, F_DIVERGENCES, FUSED, LOSSES, MEAN_LENGTH, Loss, Terms


def require(ok: bool, message: str) -> None:
    """Raise ValueError with `message` unless `ok`."""
    if not ok:
        raise ValueError(message)


def require_in(interval: str, name: str, value: float, why: str = "") -> None:
    """Raise ValueError unless `value` lies in `interval`, such as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
    require(inside, f"{name} is {value}: give a number in {interval}{why}")


@dataclasses.dataclass(frozen=True)
class PreferenceOutput:
    """What a preference loss returns; only `loss` and `losses` carry a gradient."""

    loss: Tensor  # scalar, the mean of losses
    losses: Tensor  # [B], times loss_weights and pair_weights; by quantile, not by pair, for the over_batch losses
    chosen_logps: Tensor  # [B], as given
    rejected_logps: Tensor  # [B]
    chosen_rewards: Tensor  # [B], beta * (logp - ref_logp)
    rejected_rewards: Tensor  # [B]


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The options of an objective and their defaults: the one list of them that config, ops and trainer read.

    `loss_type` is a name of `LOSSES` or several, which are added up with `loss_weights`.
    """

    loss_type: str | Sequence[str] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    loss_weights: Sequence[float] | None = None

    @classmethod
    def of(cls, source: object) -> "LossOptions":
        """The options that `source` (a config) holds as attributes of the same names."""
        return cls(**{field.name: getattr(source, field.name) for field in dataclasses.fields(cls)})

    @property
    def names(self) -> list[str]:
        """The losses by name."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    @property
    def weights(self) -> list[float]:
        """One weight per loss."""
        return [1.0] * len(self.names) if self.loss_weights is None else [float(x) for x in self.loss_weights]

    @property
    def rows(self) -> list[Loss]:
        """The losses' rows of `LOSSES`. Raises ValueError for an unknown name."""
        names = self.names
        known = bool(names) and all(name in LOSSES for name in names)
        if not known:
            raise ValueError(f"loss_type is {self.loss_type!r}: give one or more of {', '.join(LOSSES)}")
        return [LOSSES[name] for name in names]

    @property
    def reference_free(self) -> bool:
        """True when none of the losses takes a reference."""
        return not any(row.needs_reference for row in self.rows)

    @property
    def has_reference(self) -> bool:
        """True when a run has a reference: for a loss that takes one, and for sft alone, whose rewards are beside one."""
        return not self.reference_free or set(self.names) == {"sft"}

    @property
    def margin_only(self) -> bool:
        """True when dL/dchosen_logps = -dL/drejected_logps for each pair, whatever the data: all are margin losses.

        Other divergences bend the log-ratio of each side by itself. `pair_weights` are one number per pair. `ld_alpha`
        leaves the tokens up to the shorter length alone, so a token that both sides begin with weighs the same in both.
        """
        return self.f_divergence_type == "reverse_kl" and all(row.margin for row in self.rows)

    @property
    def over_batch(self) -> bool:
        """True when a pair's loss depends on the other pairs of its batch."""
        return any(row.over_batch for row in self.rows)

    @property
    def token_mean(self) -> bool:
        """True when a loss holds a mean over all chosen tokens."""
        return any(row.token_mean for row in self.rows)

    @property
    def average_rewards(self) -> bool:
        """True when rewards are beta * logp / length."""
        return self.reference_free and any(row.average_rewards for row in self.rows)

    @property
    def one_launch(self) -> bool:
        """True when the loss is one of `FUSED` alone, with weight 1 and no divergence but the KL of DPO."""
        names = self.names
        return (
            len(names) == 1 and names[0] in FUSED and self.weights == [1.0] and self.f_divergence_type == "reverse_kl"
        )

    def check(self, *, pair_weights: bool = False, ld_alpha: float | None = None) -> "LossOptions":
        """Check the options without any data; returns them.

        `pair_weights` says whether pair weights will be given (WPO), `ld_alpha` what `sum_logps` will be given. Among
        several losses an option must have an effect on at least one, a divergence must be allowed for all.

        Raises ValueError, naming the argument, for a value out of range and for an option without effect.
        """
        rows, names, weights = dict(zip(self.names, self.rows, strict=True)), self.names, self.weights
        fit = len(weights) == len(names) and all(math.isfinite(weight) for weight in weights)
        require(fit, f"loss_weights is {self.loss_weights}: give one finite number for each of the losses {names}")
        require_in("(0, inf)", "beta", self.beta)
        require_in("(0, inf)", "discopop_tau", self.discopop_tau)
        require_in("[0, inf)", "simpo_gamma", self.simpo_gamma)
        require_in("(-inf, inf)", "f_alpha_divergence_coef", self.f_alpha_divergence_coef)
        if ld_alpha is not None:
            require_in("[0, 1]", "ld_alpha", ld_alpha)
        for name, row in rows.items():
            if row.label_smoothing is not None:
                require_in(row.label_smoothing, "label_smoothing", self.label_smoothing, f" for loss_type {name!r}")
        known = self.f_divergence_type in F_DIVERGENCES
        require(known, f"f_divergence_type is {self.f_divergence_type!r}: give one of {', '.join(F_DIVERGENCES)}")
        self._require_effects(rows)
        whole = [name for name, row in rows.items() if row.over_batch or row.token_mean]
        require(
            not (pair_weights and whole), f"pair_weights cannot weigh {whole}, which is no sum over pairs: drop one"
        )
        tokens = [name for name, row in rows.items() if row.token_mean]
        require(
            ld_alpha is None or not tokens, f"ld_alpha is {ld_alpha} but {tokens} counts all tokens alike: drop one"
        )
        return self

    def _require_effects(self, rows: dict[str, Loss]) -> None:
        read = {option for row in rows.values() for option in row.options}
        if any(row.label_smoothing for row in rows.values()):
            read.add("label_smoothing")
        if self.f_divergence_type == "alpha_divergence":
            read.add("f_alpha_divergence_coef")
        for option in ("label_smoothing", "discopop_tau", "simpo_gamma", "f_alpha_divergence_coef"):
            value, default = getattr(self, option), getattr(LossOptions, option)
            without = f"loss_type {self.names} and f_divergence_type {self.f_divergence_type!r}: leave it at {default}"
            require(value == default or option in read, f"{option} is {value} but has no effect with {without}")
        diverges = not self.reference_free and all(row.f_divergence for row in rows.values())
        allowed = ", ".join(name for name, row in LOSSES.items() if row.f_divergence and row.needs_reference)
        require(
            diverges or self.f_divergence_type == "reverse_kl",
            f"f_divergence_type is {self.f_divergence_type!r} with loss_type {self.names}: leave it at 'reverse_kl' or "
            f"use only {allowed}, with or without sft",
        )


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = LossOptions.loss_type,
    beta: float = LossOptions.beta,
    label_smoothing: float = LossOptions.label_smoothing,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence_type: str = LossOptions.f_divergence_type,
    f_alpha_divergence_coef: float = LossOptions.f_alpha_divergence_coef,
    discopop_tau: float = LossOptions.discopop_tau,
    simpo_gamma: float = LossOptions.simpo_gamma,
    loss_weights: Sequence[float] | None = LossOptions.loss_weights,
    pair_weights: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
) -> PreferenceOutput:
    """The preference objective on summed log-probs. With the default options (DPO, arXiv 2305.18290 eq. 7) it equals

        delta = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
        loss = -F.logsigmoid(beta * delta).mean()

    Args:
        chosen_logps, rejected_logps: [B], log-probs summed over the completion, in nats, any floating dtype.
        ref_chosen_logps, ref_rejected_logps: [B], the reference's. Both None: they count as zero (a uniform
            reference). Refused where no loss takes a reference (simpo, orpo, sft).
        loss_type: a row of `LOSSES`, or several, which are added up with `loss_weights` (default 1 each).
        label_smoothing: honoured by sigmoid too (conservative DPO), which TRL leaves out since 0.29.
        chosen_lengths, rejected_lengths: [B] completion tokens; needed by sigmoid_norm, ipo, simpo and orpo, the
            chosen ones by sft. A length of zero divides as one.
        f_divergence_type, f_alpha_divergence_coef: the score of a log-ratio, `F_DIVERGENCES`. Exponents are clamped
            at 80: beyond, forward_kl and alpha_divergence are flat instead of infinite.
        pair_weights: [B], multiply each pair's loss (WPO: `wpo_weights`).
        mean_chosen_length: sft and orpo take -chosen_logps / mean_chosen_length as the negative log-likelihood of a
            pair. The default, chosen_lengths.float().mean(), makes their mean over pairs the mean over the chosen
            completion tokens (TRL's orpo counts the prompt's too). Whoever splits a batch passes the mean of the whole
            batch (> 0, a number or a 0-d tensor): then the parts' losses, weighted by their pairs, add up to the whole.

    Returns:
        `PreferenceOutput`, float32 or wider. Rewards are beta * (logp - ref_logp) whatever the divergence; for simpo
        and orpo (alone or with sft) beta * logp / length, as in TRL.

    Raises:
        ValueError: a shape other than [B], one reference without the other, a missing length, an option out of range
            or without effect.
    """
    options = LossOptions(
        loss_type,
        beta,
        label_smoothing,
        f_divergence_type,
        f_alpha_divergence_coef,
        discopop_tau,
        simpo_gamma,
        loss_weights,
    ).check(pair_weights=pair_weights is not None)
    tensors = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        "pair_weights": pair_weights,
    }
    for name, value in tensors.items():
        fits = value is None or (value.shape == chosen_logps.shape and value.ndim == 1 and value.numel() > 0)
        require(fits, f"{name} is no [B] tensor of B >= 1 pairs like chosen_logps: give one value per pair")
    both = (ref_chosen_logps is None) == (ref_rejected_logps is None)
    require(both, "of ref_chosen_logps and ref_rejected_logps one is None: give both or neither")
    useless = ref_chosen_logps is not None and options.reference_free
    require(not useless, f"loss_type {loss_type!r} takes no ref_chosen_logps and ref_rejected_logps: leave them out")
    if isinstance(mean_chosen_length, int | float):
        require_in("(0, inf)", "mean_chosen_length", mean_chosen_length)
    return objective(options, **tensors, mean_chosen_length=mean_chosen_length)


def objective(
    options: LossOptions,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
) -> PreferenceOutput:
    """`preference_loss` for options that were checked before (`LossOptions.check`). Raises ValueError for missing lengths."""
    dtype = torch.promote_types(torch.promote_types(chosen_logps.dtype, rejected_logps.dtype), torch.float32)
    if mean_chosen_length is None and chosen_lengths is not None:
        mean_chosen_length = chosen_lengths.to(dtype).sum().clamp(min=1) / chosen_lengths.numel()
    known = dict(zip(BOTH_LENGTHS + MEAN_LENGTH, (chosen_lengths, rejected_lengths, mean_chosen_length), strict=True))
    for name, row in zip(options.names, options.rows, strict=True):
        missing = [argument for argument in row.needs_lengths if known[argument] is None]
        hint = "give [B] completion tokens (mean_chosen_length follows from chosen_lengths)"
        require(not missing, f"loss_type {name!r} needs {', '.join(missing)}: {hint}")

    chosen, rejected = chosen_logps.to(dtype), rejected_logps.to(dtype)
    ref_chosen = torch.zeros_like(chosen) if ref_chosen_logps is None else ref_chosen_logps.to(dtype)
    ref_rejected = torch.zeros_like(rejected) if ref_rejected_logps is None else ref_rejected_logps.to(dtype)
    logratios = chosen - ref_chosen, rejected - ref_rejected
    divergence = F_DIVERGENCES[options.f_divergence_type]
    scores = (divergence(logratio, options.f_alpha_divergence_coef) for logratio in logratios)
    lengths = (None if n is None else n.to(dtype).clamp(min=1) for n in (chosen_lengths, rejected_lengths))
    terms = Terms(
        *(chosen, rejected, ref_chosen, ref_rejected, *logratios, *scores, *lengths, mean_chosen_length),
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        discopop_tau=options.discopop_tau,
        simpo_gamma=options.simpo_gamma,
    )
    losses = sum(weight * row.formula(terms) for row, weight in zip(options.rows, options.weights, strict=True))
    if pair_weights is not None:
        losses = losses * pair_weights.to(dtype)
    rewarded = (terms.chosen_mean_logps, terms.rejected_mean_logps) if options.average_rewards else logratios
    rewards = (options.beta * value.detach() for value in rewarded)
    return PreferenceOutput(losses.mean(), losses, chosen.detach(), rejected.detach(), *rewards)


def loss_and_coefficients(
    options: LossOptions,
    logps: Tensor,
    lengths: Tensor,
    ref_logps: Tensor | None,
    pair_weights: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`objective` of [2B] summed log-probs: its loss, its losses [B] and `d loss / d logps` [2B]."""
    references = (None, None) if ref_logps is None else ref_logps.chunk(2)
    chosen, rejected = lengths.chunk(2)
    with autograd_inside_op():
        leaf = logps.detach().requires_grad_()
        out = objective(
            options,
            *leaf.chunk(2),
            *references,
            chosen_lengths=chosen,
            rejected_lengths=rejected,
            pair_weights=pair_weights,
            mean_chosen_length=mean_chosen_length,
        )
        (coefficients,) = torch.autograd.grad(out.loss, leaf)
    return out.loss.detach(), out.losses.detach(), coefficients


@contextlib.contextmanager
def autograd_inside_op():
    """Autograd as outside of ops: the dispatcher switches it off inside, and torch.func cannot run under a mode."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield
