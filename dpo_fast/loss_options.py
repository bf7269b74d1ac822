"""The options of an objective: their one list, their defaults, the properties that follow from them, and their checks."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .loss_table import F_DIVERGENCES, FUSED, LOSSES, Loss

# The sft term is a mean over all chosen tokens of the batch, or over pairs, each with its own mean over tokens.
SFT_MEANS = ("tokens", "pairs")


def require(ok: bool, message: Callable[[], str]) -> None:
    """Raise ValueError with the text that `message` returns, unless `ok`.

    The text is built only on failure: torch.compile would specialise on every number in it.
    """
    if not ok:
        raise ValueError(message())


def require_in(interval: str, name: str, value: float, why: str = "") -> None:
    """Raise ValueError unless `value` lies in `interval`, such as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
    require(inside, lambda: f"{name} is {value}: give a number in {interval}{why}")


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The options of an objective and their defaults; config, ops and trainer read this one list.

    `loss_type` is one name in `LOSSES`, or several, whose losses are added up with `loss_weights`.
    """

    loss_type: str | Sequence[str] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    loss_weights: Sequence[float] | None = None
    sft_weight: float = 0.0
    sft_mean: str = "tokens"
    average_log_prob: bool = False

    @classmethod
    def of(cls, source: object) -> "LossOptions":
        """The options that `source` (a config) has as attributes of the same names; the others keep their defaults."""
        names = [field.name for field in dataclasses.fields(cls) if hasattr(source, field.name)]
        return cls(**{name: getattr(source, name) for name in names})

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
        """True when a run has a reference: a loss takes one, or the loss is sft alone, whose rewards are measured from one."""
        return not self.reference_free or set(self.names) == {"sft"}

    @property
    def margin_only(self) -> bool:
        """True when dL/dchosen_logps = -dL/drejected_logps for each pair, whatever the data: all are margin losses.

        Another divergence, or a mean over tokens, transforms each side's log-ratio by itself and breaks this.
        `pair_weights` and `label_smoothing` are one number per pair and do not. Nor does `ld_alpha`: it leaves the tokens
        up to the shorter length alone, so a token in a common beginning has the same weight on both sides.
        """
        plain = self.f_divergence_type == "reverse_kl" and not self.average_log_prob and self.sft_weight == 0
        return plain and all(row.margin for row in self.rows)

    @property
    def over_batch(self) -> bool:
        """True when a pair's loss depends on the other pairs of its batch."""
        return any(row.over_batch for row in self.rows)

    @property
    def token_mean(self) -> bool:
        """True when a loss or the sft term is a mean over all chosen tokens."""
        return any(row.token_mean for row in self.rows) or (self.sft_weight != 0 and self.sft_mean == "tokens")

    @property
    def average_rewards(self) -> bool:
        """True when rewards are beta * logp / length."""
        return self.reference_free and any(row.average_rewards for row in self.rows)

    @property
    def one_launch(self) -> bool:
        """True when the loss is a single one of `FUSED` with weight 1 and DPO's own divergence, the reverse KL."""
        names = self.names
        alone = len(names) == 1 and names[0] in FUSED and self.weights == [1.0] and self.sft_weight == 0
        return alone and self.f_divergence_type == "reverse_kl" and not self.average_log_prob

    def check(
        self, *, pair_weights: bool = False, ld_alpha: float | None = None, soft_labels: bool = False
    ) -> "LossOptions":
        """Check the options without any data, and return them.

        `pair_weights` says whether pair weights will be given (WPO), `soft_labels` whether `label_smoothing` will be a
        tensor, and `ld_alpha` is the value that `sum_logps` will be given. Of several losses at least one must be
        affected by an option, and all must allow a divergence.

        Raises ValueError, naming the argument, for a value out of range and for an option without effect.
        """
        rows, names, weights = dict(zip(self.names, self.rows, strict=True)), self.names, self.weights
        fit = len(weights) == len(names) and all(abs(weight) < math.inf for weight in weights)
        require(fit, lambda: f"loss_weights is {weights}: give one finite number for each of the losses {names}")
        require_in("(0, inf)", "beta", self.beta)
        require_in("(0, inf)", "discopop_tau", self.discopop_tau)
        require_in("[0, inf)", "simpo_gamma", self.simpo_gamma)
        require_in("(-inf, inf)", "f_alpha_divergence_coef", self.f_alpha_divergence_coef)
        require_in("[0, inf)", "sft_weight", self.sft_weight)
        require(
            self.sft_mean in SFT_MEANS, lambda: f"sft_mean is {self.sft_mean!r}: give one of {', '.join(SFT_MEANS)}"
        )
        if ld_alpha is not None:
            require_in("[0, 1]", "ld_alpha", ld_alpha)
        if soft_labels:
            self._check_soft_labels(rows)
        else:
            for name, row in rows.items():
                if row.label_smoothing is not None:
                    require_in(row.label_smoothing, "label_smoothing", self.label_smoothing, f" for loss_type {name!r}")
        known = self.f_divergence_type in F_DIVERGENCES
        require(
            known, lambda: f"f_divergence_type is {self.f_divergence_type!r}: give one of {', '.join(F_DIVERGENCES)}"
        )
        self._require_effects(rows)
        self._require_sums(rows, pair_weights, ld_alpha)
        return self

    def _check_soft_labels(self, rows: dict[str, Loss]) -> None:
        smoothed = [name for name, row in rows.items() if row.label_smoothing is not None]
        able = ", ".join(name for name, row in LOSSES.items() if row.label_smoothing and not row.over_batch)
        require(
            bool(smoothed),
            lambda: f"label_smoothing per pair has no effect with loss_type {self.names}: leave it out, or use {able}",
        )
        whole = [name for name in smoothed if rows[name].over_batch]
        require(
            not whole,
            lambda: f"label_smoothing per pair cannot go with {whole}, which compares quantiles: give a number",
        )

    def _require_effects(self, rows: dict[str, Loss]) -> None:
        read = {option for row in rows.values() for option in row.options}
        if any(row.label_smoothing for row in rows.values()):
            read.add("label_smoothing")
        if self.f_divergence_type == "alpha_divergence":
            read.add("f_alpha_divergence_coef")
        for option in ("label_smoothing", "discopop_tau", "simpo_gamma", "f_alpha_divergence_coef"):
            if option not in read and getattr(self, option) != getattr(LossOptions, option):
                value, default = getattr(self, option), getattr(LossOptions, option)
                without = f"loss_type {self.names} and f_divergence_type {self.f_divergence_type!r}"
                raise ValueError(f"{option} is {value} but has no effect with {without}: leave it at {default}")
        require(
            self.sft_weight != 0 or self.sft_mean == LossOptions.sft_mean,
            lambda: f"sft_mean is {self.sft_mean!r} but has no effect without sft_weight: give both",
        )
        diverges = not self.reference_free and all(row.f_divergence for row in rows.values())
        allowed = ", ".join(name for name, row in LOSSES.items() if row.f_divergence and row.needs_reference)
        require(
            diverges or self.f_divergence_type == "reverse_kl",
            lambda: (
                f"f_divergence_type is {self.f_divergence_type!r} with loss_type {self.names}: leave it at "
                f"'reverse_kl' or use only {allowed}, with or without sft"
            ),
        )

    def _require_sums(self, rows: dict[str, Loss], pair_weights: bool, ld_alpha: float | None) -> None:
        """Refuse weights on pairs or tokens where a loss is not a sum over them, and refuse to average twice."""
        term = ["the sft term"] if self.sft_weight != 0 else []
        whole = [name for name, row in rows.items() if row.over_batch or row.token_mean]
        whole += term if self.sft_mean == "tokens" else []
        require(
            not (pair_weights and whole),
            lambda: f"pair_weights cannot weigh {whole}, which is no sum over pairs: drop one",
        )
        tokens = [name for name, row in rows.items() if row.token_mean] + term
        require(
            ld_alpha is None or not tokens,
            lambda: f"ld_alpha is {ld_alpha} but {tokens} counts all tokens alike: drop one",
        )
        averaged = [name for name, row in rows.items() if row.needs_lengths]
        require(
            not (self.average_log_prob and averaged),
            lambda: f"average_log_prob has no meaning with {averaged}, which divides by lengths itself: leave it out",
        )


def check_label_smoothing(values: Tensor, options: LossOptions) -> None:
    """Raise ValueError unless the values [B] lie in the range of every loss that reads them; waits for their device."""
    low, high = (float(x) for x in torch.aminmax(values.detach()))
    for name, row in zip(options.names, options.rows, strict=True):
        for value in (low, high):
            if row.label_smoothing is not None:
                require_in(row.label_smoothing, "a value of label_smoothing", value, f" for loss_type {name!r}")
