"""Warnings for measures that pass a limit, with what to do about it: one row of a table per kind of overfitting."""

from collections.abc import Callable

from .measure import wilson
from .settings import Limits


def _ratio(limit: float, value: float, start: float) -> bool:
    return start > 0 and not 1 / limit <= value / start <= limit


def _gap(limit: float, m: dict) -> bool:
    """Whether the gap is above the limit and more than chance: the two confidence intervals do not overlap."""
    low, high = (
        wilson(m["train_accuracy"], m["train_sample"])["low"],
        wilson(m["accuracy"], m["heldout_pairs"])["high"],
    )
    return m["train_accuracy"] - m["accuracy"] > limit and low > high


# (name in Limits, whether the limit is passed, sentence). `m` are a round's metrics, `s` those of the start.
_CHECKS: tuple[tuple[str, Callable[[float, dict, dict], bool], str], ...] = (
    (
        "kl",
        lambda limit, m, s: m["kl_start"] > limit,
        "the policy is {kl_start:.2f} nats per token away from the start (limit {limit:g}): raise beta, train fewer "
        "epochs, or use --reference start",
    ),
    (
        "length",
        lambda limit, m, s: _ratio(limit, m["length"], s["length"]),
        "samples have {length:.0f} tokens where the start's had {start[length]:.0f} (limit {limit:g} times): the judge may "
        "reward length; try ld_alpha, loss_type sigmoid_norm or simpo, or a judge that sees past it",
    ),
    (
        "repetition",
        lambda limit, m, s: m["repetition"] > s["repetition"] + limit,
        "{repetition:.0%} of the samples' 4-grams are repeated ({start[repetition]:.0%} at the start): raise beta, lower "
        "the learning rate, or add sft to loss_type",
    ),
    (
        "entropy",
        lambda limit, m, s: m["entropy"] < limit * s["entropy"],
        "the samples' entropy fell to {entropy:.2f} nats per token ({start[entropy]:.2f} at the start): the policy "
        "collapses; raise beta, train fewer epochs, or sample at a higher temperature",
    ),
    (
        "chosen_drop",
        lambda limit, m, s: m["chosen_delta"] is not None and m["chosen_delta"] < -limit,
        "chosen completions lost {drop:.1f} nats in this round (limit {limit:g}): DPO pushes both sides down; add sft to "
        "loss_type, or try ipo or apo_zero",
    ),
    (
        "gap",
        lambda limit, m, s: m["accuracy"] is not None and _gap(limit, m),
        "reward accuracy is {train_accuracy:.0%} in training and {accuracy:.0%} held out: it overfits the labels; train "
        "fewer epochs, set label_smoothing (cDPO), use ipo, or label more prompts",
    ),
)


def warnings(metrics: dict, start: dict, limits: Limits) -> list[str]:
    """One sentence for each limit that a round's metrics pass."""
    said = []
    for name, passed, sentence in _CHECKS:
        limit = getattr(limits, name)
        if limit is not None and passed(limit, metrics, start):
            drop = -(metrics["chosen_delta"] or 0.0)
            said.append(sentence.format(**metrics, start=start, limit=limit, drop=drop))
    won = metrics.get("win_before")
    if won and won["high"] < 0.5:
        said.append(
            f"the judge prefers the round before ({won['rate']:.0%} wins, at most {won['high']:.0%}): this round made it "
            "worse; use the best round's model, lower the learning rate, or label more pairs"
        )
    return said
