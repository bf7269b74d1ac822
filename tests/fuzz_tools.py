"""What the fuzz tests share: values, layouts, strategies, and the error that rounding causes in an ill-conditioned case.

To the floor of the rule in op_tools.py comes what is known: a logit z to eps * |z|, a sequence's log-prob to eps times itself.
Losses are evaluated that far away.
"""

import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from op_tools import FLOORS, HALF, assert_within_rule

from dpo_fast import reference
from dpo_fast.backends.sequences import segment_sum
from dpo_fast.loss_table import LOSSES
from dpo_fast.losses import LossOptions, loss_and_coefficients

EPS = 2.0**-21  # four units in the last place of float32
DTYPES = [torch.float32, *HALF]
# Vectors hold 8 or 16 entries and are taken two at a time; a block holds 2048.
WORDS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 2047, 2048, 2049, 2080, 4095, 4096, 4097, 5000]

VALUES = {
    "equal": lambda v, rng, low: torch.full((v,), 3.25, dtype=torch.float64),
    "normal": lambda v, rng, low: 2 * torch.randn(v, generator=rng, dtype=torch.float64),
    "wide": lambda v, rng, low: 2e4 * torch.rand(v, generator=rng, dtype=torch.float64) - 1e4,
    "far": lambda v, rng, low: 1e4 + torch.randn(v, generator=rng, dtype=torch.float64),
    "peaked": lambda v, rng, low: torch.randn(v, generator=rng, dtype=torch.float64).index_fill_(
        0, torch.randint(v, (1,), generator=rng), 60.0
    ),
    "subnormal": lambda v, rng, low: 1e-40 * torch.randn(v, generator=rng, dtype=torch.float64),
    "rising": lambda v, rng, low: torch.linspace(-50, 50, v, dtype=torch.float64),
    "falling": lambda v, rng, low: torch.linspace(50, -50, v, dtype=torch.float64),
    "masked": lambda v, rng, low: _masked(v, rng, -math.inf),
    "lowest": lambda v, rng, low: _masked(v, rng, low),
    "last word": lambda v, rng, low: torch.full((v,), low, dtype=torch.float64).index_fill_(
        0, torch.tensor(v - 1), 0.5
    ),
}
MASKS = ("masked", "lowest", "last word")
LOW = -2e4  # less than that is a mask


def _masked(v, rng, low):
    x = 2 * torch.randn(v, generator=rng, dtype=torch.float64)
    hidden = torch.rand(v, generator=rng) < 0.6
    hidden[torch.randint(v, (1,), generator=rng)] = False
    return x.masked_fill(hidden, low)


def cases(**more):
    """What every op draws, as a dict that `@example` can spell."""
    common = {
        "v": st.sampled_from(WORDS) | st.integers(1, 100),
        "dtype": st.sampled_from(DTYPES),
        "pad": st.tuples(st.integers(0, 3), st.integers(0, 9)),  # words of other memory before and behind a row
        "scale": st.sampled_from([1.0, 0.25, -1.5, 1e-3]),
        "softcap": st.sampled_from([None, 30.0, 0.5]),
        "threads": st.integers(1, 4),
        "seed": st.integers(0, 99),
    }
    return st.fixed_dictionaries(common | more)


KINDS = st.sampled_from(list(VALUES))
WHERE = st.sampled_from(["any", "first", "last", "top", "ignored"])
LENGTHS = st.integers(1, 3).flatmap(lambda b: st.lists(st.integers(0, 4), min_size=2 * b, max_size=2 * b))
OPTIONS = st.sampled_from(list(LOSSES)).flatmap(
    lambda name: st.fixed_dictionaries(
        {
            "loss_type": st.just(name),
            "beta": st.sampled_from([0.1, 0.01, 2.0]),
            "label_smoothing": st.sampled_from(
                {None: [0.0], "(0, 1)": [0.1, 0.5], "[0, 0.5)": [0.0, 0.3]}.get(
                    LOSSES[name].label_smoothing, [0.0, 0.2, 1.0]
                )
            ),
        }
        | ({"discopop_tau": st.sampled_from([0.05, 1.0])} if name == "discopop" else {})
        | ({"simpo_gamma": st.sampled_from([0.5, 0.0, 3.0])} if name == "simpo" else {})
    )
)


def rows(kinds, case):
    """[N, V] of the kinds named, in memory whose other words are NaN; and the last row ends it where nothing is behind."""
    rng = torch.Generator().manual_seed(case["seed"])
    before, behind = case["pad"]
    v, dtype = case["v"], case["dtype"]
    # Of a temperature below 1 the lowest number would be infinite.
    low = torch.finfo(dtype).min * (1.0 if case.get("temperature", 1.0) >= 1 else 0.5)
    # A mask times a negative number is the largest logit, and infinite.
    kinds = ["normal" if kind in MASKS and case["scale"] < 0 else kind for kind in kinds]
    memory = torch.full((len(kinds), before + v + behind), math.nan, dtype=dtype)
    x = memory[:, before : before + v]
    for n, kind in enumerate(kinds):
        x[n] = VALUES[kind](v, rng, low).to(dtype)
    return x, rng


def pick(x, where, rng, scale=1.0, masked=False):
    """Targets [N]; words that are masked only with `masked`."""
    found = torch.full((len(x),), -100)
    for n, place in enumerate(where):
        if place == "ignored":
            continue
        top = int((x[n].double() * scale).argmax())
        choice = {
            "first": 0,
            "last": x.shape[1] - 1,
            "top": top,
            "any": int(torch.randint(x.shape[1], (1,), generator=rng)),
        }
        hidden = x[n, choice[place]] < LOW
        found[n] = top if hidden and not masked else choice[place]
    return found


def with_threads(run, threads, bits):
    """What `run` returns with `threads` threads; with `bits`, the same as with one."""
    one = run() if bits else {}
    try:
        torch.set_num_threads(threads)
        many = run()
    finally:
        torch.set_num_threads(1)
    for name, x in one.items():
        torch.testing.assert_close(many[name], x, rtol=0, atol=0, equal_nan=True, msg=f"{name} with {threads} threads")
    return many


def compare(ours, plain, exact, dtype, known):
    """By the rule, each name with the error `known` that its own case brings, in its own units."""
    for name, x in ours.items():
        y = exact[name]
        size = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 1.0
        floor = FLOORS[dtype] + known.get(name, 0.0) / max(size, 1e-30)
        assert_within_rule({name: x}, {name: plain[name]}, {name: y}, floor)


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def of_transform(x, case, temperature=1.0):
    """eps * |z|, a probability's relative error; and the largest slope of z."""
    z = reference.transform_logits(x[x > LOW].double(), case["scale"], case["softcap"], temperature)
    return EPS * largest(z), abs(case["scale"]) / temperature


bounded = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def fuzz(examples):
    """`examples` cases: a quarter of them in the profile "short", as many as the profile says in "long"."""
    profile = settings.get_current_profile_name()
    if profile == "long":
        return settings(settings.get_profile("long"))
    return settings(bounded, max_examples=examples // 4 if profile == "short" else examples)


# ---- Pairs ----


def nearby(logps, ref, lengths, options, per_token):
    """Errors of loss, losses and of d loss / d logps where log-probs are known to eps times themselves."""
    size = logps.abs() if ref is None else logps.abs() + ref.abs()
    step = EPS * (1 + size) + lengths * per_token
    one = torch.ones(len(logps) // 2, dtype=torch.float64)
    at = [
        loss_and_coefficients(LossOptions(**options), logps + sign * step, lengths, ref)
        for sign in (0, torch.cat([one, -one]), torch.cat([-one, one]), 1, -1)
    ]
    moved = [max((x - y).abs().max().item() for y in rest) for x, *rest in zip(*at, strict=True)]
    # Terms that cancel, each with its own rounding.
    of_coef = moved[2] + EPS * options["beta"]
    return {"loss": EPS + moved[0], "losses": EPS + moved[1]}, of_coef, at[0][2].abs().max().item(), step.max().item()


LOSS = {"lengths": LENGTHS, "options": OPTIONS, "ref": st.sampled_from([None, 0.0, 3.0, 1e4]), "packed": st.booleans()}
LOSS |= {"loss_grad": st.sampled_from([1.0, -1.7]), "between": st.integers(0, 1)}  # rows between padded sequences


def layout(case, where, between=0):
    """Where the target of each row is, and the bounds of the sequences of `lengths`, packed or padded."""
    lengths = case["lengths"]
    size = max(1, *lengths) + between
    places = [[where[(s + t) % len(where)] if t < n else "ignored" for t in range(size)] for s, n in enumerate(lengths)]
    if case["packed"]:
        flat = [place for s, n in enumerate(lengths) for place in places[s][:n]]
        return flat, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return [place for row in places for place in row], None


def shaped(x, case, between=0):
    """[N, ...] -> [S, T, ...] where the batch is padded."""
    if case["packed"]:
        return x
    x = x.unflatten(0, (len(case["lengths"]), -1))
    return x[:, : x.shape[1] - between]


def references(case, logps):
    if case["ref"] is None or LossOptions(case["options"]["loss_type"]).reference_free:
        return None
    rng = torch.Generator().manual_seed(case["seed"] + 1)
    return (logps + case["ref"] * torch.randn(len(logps), generator=rng, dtype=torch.float64)).float()


def summed(token, bounds):
    return token.sum(-1) if bounds is None else segment_sum(token, bounds)


def with_errors(case, logps, ref, lengths, per_token):
    """Errors of the fields of a loss by name, and of a row's coefficient: beside its size, and in all."""
    options = {**case["options"], "loss_type": [case["options"]["loss_type"]]}
    known, of_coef, coef, step = nearby(logps, None if ref is None else ref.double(), lengths, options, per_token)
    rewards = dict.fromkeys(("chosen_rewards", "rejected_rewards"), step * options["beta"])
    return known | rewards | dict.fromkeys(("chosen_logps", "rejected_logps"), step), of_coef, coef
