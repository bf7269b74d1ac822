"""Values of options that would waste a run: each is an error before any file is read."""

import math

from ..losses import LossOptions
from .metrics import COLUMNS

# The metrics of an evaluation: columns of the metrics' table, the tokens so far, and transformers' own rates.
_EVALUATED = (
    *COLUMNS[: COLUMNS.index("pairs")], "num_tokens", "runtime", "samples_per_second", "steps_per_second",
)  # fmt: skip
# name -> (lower bound, whether the bound itself is allowed)
_BOUNDS = {
    "learning_rate": (0, False),
    "weight_decay": (0, True),
    "max_grad_norm": (0, True),
    "adam_epsilon": (0, True),
    "warmup_steps": (0, True),
    "eval_delay": (0, True),
    "gradient_accumulation_steps": (1, True),
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "save_total_limit": (1, True),
    "dataloader_num_workers": (0, True),
    "dataset_num_proc": (1, True),
}


def check_numbers(args) -> None:
    """Raise ValueError for a number out of range, naming the option and its range.

    Call it before transformers looks at the values: it divides by some of them.
    """
    for name, (low, inclusive) in _BOUNDS.items():
        value = getattr(args, name, None)
        if isinstance(value, str):
            value = _number(name, value)
        if value is None:
            continue
        if not math.isfinite(value) or value < low or (value == low and not inclusive):
            most = f"at least {low}" if inclusive else f"above {low}"
            raise ValueError(f"{name} is {value}: give a finite number {most}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= float(getattr(args, name)) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}: give a number in [0, 1)")
    if args.max_steps != -1 and args.max_steps < 1:
        raise ValueError(f"max_steps is {args.max_steps}: give at least 1, or -1 for num_train_epochs")
    if args.max_steps == -1 and not 0 < args.num_train_epochs < math.inf:
        raise ValueError(f"num_train_epochs is {args.num_train_epochs}: nothing would be trained; give more than 0")
    for what in ("logging", "eval", "save"):
        steps, strategy = getattr(args, f"{what}_steps"), getattr(args, f"{what}_strategy")
        if steps is not None and getattr(strategy, "value", strategy) == "steps" and not 0 < float(steps) < math.inf:
            more = "" if what == "eval" else f", or {what}_strategy no"
            raise ValueError(f"{what}_steps is {steps}: give a number of steps, or a share of all steps below 1{more}")


def check_evaluation(args) -> None:
    """Raise ValueError unless options that choose a best model come with evaluations and a metric that these report."""
    evaluates = getattr(args.eval_strategy, "value", args.eval_strategy) != "no"
    best = getattr(args.save_strategy, "value", args.save_strategy) == "best"
    for name, given in (("load_best_model_at_end", args.load_best_model_at_end), ("save_strategy=best", best)):
        if given and not evaluates:
            raise ValueError(f"{name} has no effect without evaluation: set eval_strategy to steps or epoch")
    metric = args.metric_for_best_model
    if metric is None:
        return
    name = metric.removeprefix("eval_")
    # With several evaluation sets, each metric's name begins with its set's.
    if not any(name == known or name.endswith(f"_{known}") for known in _EVALUATED):
        near = [known for known in _EVALUATED if name[:7] in known]  # accuracy, accuracies
        raise ValueError(
            f"metric_for_best_model is {metric!r}, which no evaluation reports: give "
            + (f"{near[0]}" if len(near) == 1 else f"one of {', '.join(near or _EVALUATED)}")
        )


def check_on_nan(args) -> None:
    """Raise ValueError where steps that are not finite cannot be treated as `on_nan` says."""
    if args.on_nan not in ("stop", "skip"):
        raise ValueError(f"on_nan is {args.on_nan!r}: give stop or skip")
    if args.on_nan == "skip" and args.fp16:
        raise ValueError("on_nan=skip has no effect with fp16, whose loss scaling leaves such steps out: drop it")
    if args.on_nan == "skip" and args.deepspeed:
        raise ValueError("on_nan=skip does not work with DeepSpeed, whose engine steps by itself: drop it")


def check_tokens_per_step(args) -> None:
    """Raise ValueError for what needs batches of a number of pairs, not of a number of tokens."""
    if args.tokens_per_step is None:
        return
    if args.per_device_train_batch_size != args.defaults()["per_device_train_batch_size"]:
        raise ValueError("tokens_per_step and per_device_train_batch_size exclude each other: leave one out")
    if LossOptions.of(args).over_batch:
        raise ValueError(
            f"tokens_per_step puts other pairs together, and loss_type {args.loss_type} compares all pairs of a batch: "
            "set per_device_train_batch_size instead"
        )
    if args.deepspeed:
        raise ValueError("tokens_per_step gives batches of unequal size, which DeepSpeed's engine counts itself")


def check_streamed(args, precomputed: bool = False) -> None:
    """Raise ValueError for what a stream of training pairs, whose number nobody knows, cannot have.

    precomputed: whether the reference's log-probs are computed before training.
    """
    if args.max_steps <= 0:
        raise ValueError("the train data is streamed, so nobody knows where an epoch ends: set max_steps")
    if args.tokens_per_step is not None:
        raise ValueError(
            "the train data is streamed: tokens_per_step puts pairs of all the data together, leave it out"
        )
    if precomputed:
        raise ValueError(
            "the train data is streamed, and precompute_ref_log_probs is not supported with IterableDataset: the reference's "
            "log-probs cannot be computed before training. Set it to False (a second model in memory), or train adapters "
            "(use_peft)"
        )


def check_reference(args) -> None:
    """Raise ValueError for options of the reference that exclude each other or are out of range."""
    if args.sync_ref_model and args.precompute_ref_log_probs:
        raise ValueError("sync_ref_model moves the reference, so precompute_ref_log_probs would be stale: drop one")
    if not 0 < args.ref_model_mixup_alpha <= 1:
        raise ValueError(f"ref_model_mixup_alpha must lie in (0, 1], got {args.ref_model_mixup_alpha}")
    if args.ref_model_sync_steps < 1:
        raise ValueError(f"ref_model_sync_steps must be at least 1, got {args.ref_model_sync_steps}")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}: give a number") from None
