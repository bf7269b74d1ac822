"""Random shapes, strides, values and options: every back end that runs here against float64, by the rule of op_tools.

hypothesis draws a bounded number of cases, the same ones each time, and shrinks those that fail. This draws many new ones:

    python -m pytest tests/test_fuzz.py tests/test_fuzz_head.py --hypothesis-profile=long

Every case that failed once is an `@example`. The ops that hold the head are in test_fuzz_head.py; fuzz_tools.py is shared.
"""

import pytest
import torch
from fuzz_tools import (
    EPS,
    KINDS,
    LOSS,
    MASKS,
    WHERE,
    cases,
    compare,
    fuzz,
    layout,
    of_transform,
    pick,
    references,
    rows,
    shaped,
    summed,
    with_errors,
    with_threads,
)
from hypothesis import example, given
from hypothesis import strategies as st
from op_tools import fields

from dpo_fast import dpo_loss, reference, token_logps
from dpo_fast.backends import eager
from dpo_fast.backends.eager import OUTPUTS
from dpo_fast.backends.sequences import scored_lengths

# ---- Log-probs ----

TOKENS = cases(
    rows=st.lists(st.tuples(KINDS, WHERE), max_size=5),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    outputs=st.sampled_from([OUTPUTS, (), ("entropy", "mean_logits")]),
)
PLAIN = {"v": 33, "dtype": torch.float32, "pad": (0, 0), "scale": 1.0, "softcap": None, "threads": 1, "seed": 0}
PLAIN_TOKENS = {**PLAIN, "temperature": 1.0, "outputs": OUTPUTS}


def check_top(found, z, targets):
    """A target is called the most probable where it is; near ties may go either way."""
    scored = targets != -100
    picked, top = z.gather(-1, targets.clamp(min=0)[:, None])[:, 0], z.amax(-1)
    gap = top - picked
    sure = (gap == 0) | (gap > EPS * (1 + top.abs()))
    assert torch.equal(found[scored & sure], (gap == 0)[scored & sure]), "is_top1"
    assert not found[~scored].any()


# The first block holds nothing but masks of finite size: their distance to the top times their number has no end.
@example({**PLAIN_TOKENS, "v": 2049, "rows": [("last word", "last")]})
# Such masks times a factor: a * b - c in one rounding is no 0 for the largest, but 1e31.
@example({**PLAIN_TOKENS, "v": 2049, "temperature": 0.7, "rows": [("last word", "any")]})
# A tanh of the target by one library, of the row by another: log-probs above 0, and a top that is none.
@example({**PLAIN_TOKENS, "v": 1, "softcap": 30.0, "rows": [("normal", "any")] * 5})
@example({**PLAIN_TOKENS, "softcap": 0.5, "seed": 3, "rows": [("normal", "top")] * 5})
# Sums of one block carried to the next.
@example({**PLAIN_TOKENS, "v": 5000, "rows": [(kind, "any") for kind in ("normal", "rising", "falling", "normal")]})
@given(case=TOKENS)
@fuzz(300)
def test_token_logps(backend, case):
    x, rng = rows([kind for kind, _ in case["rows"]], case)
    targets = pick(x, [place for _, place in case["rows"]], rng, case["scale"], masked=True)
    grad = torch.tensor([1.0, -0.5, 0.0, 3.0, 1e-3], dtype=torch.float64)[: len(x)]
    transform = {"logit_scale": case["scale"], "softcap": case["softcap"], "temperature": case["temperature"]}
    outputs = case["outputs"]

    def run(function, x, **more):
        x = x.detach().requires_grad_()
        found = function(x, targets, **transform, **more)
        logps, stats = found if isinstance(found, tuple) else (found, {})
        (dlogits,) = torch.autograd.grad(logps, x, grad.to(logps.dtype))
        return {"logps": logps.detach(), **stats, "dlogits": dlogits}

    def expected(x):
        z = reference.transform_logits(x.to(eager.wide_dtype(x.dtype)), *transform.values())
        stats = {}
        for name in outputs:
            values = reference.STATISTICS[name](z, targets, case["temperature"])
            stats[name] = torch.where(targets != -100, values, 0)
        return run(reference.token_logps, x) | stats

    ours = with_threads(
        lambda: run(token_logps, x, outputs=outputs, backend=backend), case["threads"], backend == "csrc"
    )
    plain, exact = expected(x), expected(x.double())
    for found in (plain, exact):
        found.pop("is_top1", None)
    if "is_top1" in ours:
        z = reference.transform_logits(x.double(), *transform.values())
        check_top(ours.pop("is_top1"), z, targets)
    # A sum of the lowest numbers has no end in float32.
    if any(kind in MASKS for kind, _ in case["rows"]):
        for found in (ours, plain, exact):
            found.pop("mean_logits", None)
    error, slope = of_transform(x, case, case["temperature"])
    of_logps = EPS + (error if (*transform.values(),) != (1.0, None, 1.0) else 0.0)
    known = dict.fromkeys(("logps", "entropy", "log_sum_sq_probs"), of_logps)
    known["mean_logits"] = 16 * error * case["temperature"]
    known["dlogits"] = (EPS + error) * slope * 3
    compare(ours, plain, exact, x.dtype, known)


# ---- The loss ----

PLAIN_LOSS = {**PLAIN, "ref": None, "packed": False, "loss_grad": 1.0, "between": 0, "inplace": False}
SIGMOID = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}


# Targets that are one column of more: a view of them as [N] has gaps.
@example({**PLAIN_LOSS, "lengths": [1, 1], "between": 1, "kinds": ["normal"], "where": ["any"], "options": SIGMOID})
@given(
    case=cases(
        **LOSS,
        kinds=st.lists(KINDS, min_size=1, max_size=4),
        where=st.lists(WHERE, min_size=1, max_size=3),
        inplace=st.booleans(),
    )
)
@fuzz(200)
@pytest.mark.slow
def test_dpo_loss(backend, case):
    case = {**case, "scale": 1.0, "softcap": None}
    between = 0 if case["inplace"] else case["between"]
    where, bounds = layout(case, case["where"], between)
    x, rng = rows([case["kinds"][n % len(case["kinds"])] for n in range(len(where))], case)
    x, targets = (shaped(y, case, between) for y in (x, pick(x, where, rng)))
    logps = summed(reference.token_logps(x.double(), targets), bounds)
    ref, lengths = references(case, logps), scored_lengths(targets, -100, bounds)

    def run(function, x, **more):
        leaf = x.detach()
        if more.get("inplace"):
            # It is overwritten: a copy with the same strides.
            memory = leaf.as_strided((leaf.untyped_storage().nbytes() // leaf.element_size(),), (1,), 0).clone()
            leaf = memory.as_strided(x.shape, x.stride(), x.storage_offset())
        leaf.requires_grad_()
        wide = None if ref is None else ref.to(eager.wide_dtype(x.dtype))
        out = function(leaf, targets, wide, cu_seqlens=bounds, **case["options"], **more)
        return fields(out, case["loss_grad"], logits=leaf)

    ours = with_threads(
        lambda: run(dpo_loss, x, backend=backend, inplace=case["inplace"]), case["threads"], backend == "csrc"
    )
    plain, exact = run(reference.dpo_loss, x), run(reference.dpo_loss, x.double())
    known, of_coef, coef = with_errors(case, logps, ref, lengths, 0.0)
    error, _ = of_transform(x, case)
    # A gradient in half precision is rounded again when it is multiplied, and float16 has no numbers below 2**-24.
    twice = 0.0 if x.dtype == torch.float32 else 2.0**-8 * coef + 2.0**-23
    known["dlogits"] = abs(case["loss_grad"]) * (of_coef + (EPS + error) * coef + twice)
    compare(ours, plain, exact, x.dtype, known)
