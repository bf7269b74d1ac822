"""`linear_token_logps` and `linear_dpo_loss` on random shapes, tiles, workspaces and options: as test_fuzz.py."""

import pytest
import torch
from fuzz_tools import (
    EPS,
    LOSS,
    cases,
    compare,
    fuzz,
    largest,
    layout,
    of_transform,
    references,
    shaped,
    summed,
    with_errors,
    with_threads,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from op_tools import fields, small_tiles

from dpo_fast import linear_dpo_loss, linear_token_logps, reference
from dpo_fast.backends.sequences import scored_lengths

HIDDEN = {"zero": 0.0, "small": 1e-3, "normal": 1.0, "large": 40.0}
HEAD = {
    "d": st.integers(1, 8),
    "bias": st.booleans(),
    "needs": st.sampled_from([("hidden",), ("weight",), ("hidden", "weight"), ("hidden", "weight", "bias")]),
    "tile": st.integers(1, 9),
    "kept": st.sampled_from([0, 2, 5, 100]),
    "size": st.sampled_from(list(HIDDEN)),
}
HEAD["v"] = st.sampled_from([1, 2, 15, 16, 17, 33, 65, 2049]) | st.integers(1, 60)


def head(case, n, rng):
    leaves = {"hidden": HIDDEN[case["size"]] * torch.randn(n, case["d"], generator=rng, dtype=torch.float64)}
    leaves["weight"] = torch.randn(case["v"], case["d"], generator=rng, dtype=torch.float64)
    if case["bias"]:
        leaves["bias"] = torch.randn(case["v"], generator=rng, dtype=torch.float64)
    leaves = {k: x.to(case["dtype"]) for k, x in leaves.items()}
    needs = tuple(k for k in case["needs"] if k in leaves)
    return leaves, needs


def of_head(case, leaves, coef, of_coef, temperature=1.0):
    """A logit's error, and those of the gradients by name."""
    wide = {k: x.double() for k, x in leaves.items()}
    z = torch.nn.functional.linear(wide["hidden"], wide["weight"], wide.get("bias"))
    error, slope = of_transform(z, case, temperature)
    # Terms of a product that cancel, and the residual in the type of the head.
    of_row = coef * (EPS + error + 2 * torch.finfo(case["dtype"]).eps) + of_coef
    # float16 has no numbers below 2**-24.
    least = 2.0**-23 if case["dtype"] == torch.float16 else 0.0
    of_row += least
    high = {k: x.abs().max().item() if x.numel() else 0.0 for k, x in wide.items()}
    n = max(1, len(z))
    return error, {
        "dhidden": 2 * slope * of_row * high["weight"],
        "dweight": n * (slope * of_row * high["hidden"] + least),
        "dbias": n * slope * of_row,
    }


def run_head(function, leaves, needs, *args, wide=False, **more):
    leaves = {k: (x.double() if wide else x).detach().requires_grad_(k in needs) for k, x in leaves.items()}
    wanted = {k: leaves[k] for k in needs}
    return function(leaves["hidden"], leaves["weight"], *args, bias=leaves.get("bias"), **more), wanted


@given(case=cases(**HEAD, n=st.integers(0, 12), temperature=st.sampled_from([1.0, 0.7])))
@fuzz(100)
def test_linear_token_logps(backend, case):
    rng = torch.Generator().manual_seed(case["seed"])
    leaves, needs = head(case, case["n"], rng)
    targets = torch.randint(case["v"], (case["n"],), generator=rng)
    grad = torch.randn(case["n"], generator=rng, dtype=torch.float64)
    transform = {"logit_scale": case["scale"], "softcap": case["softcap"], "temperature": case["temperature"]}
    row = case["v"] * case["dtype"].itemsize

    def run(function, **more):
        found, wanted = run_head(function, leaves, needs, targets, **transform, **more)
        logps = found[0] if isinstance(found, tuple) else found
        grads = torch.autograd.grad(logps, list(wanted.values()), grad.to(logps.dtype)) if wanted else ()
        return {"logps": logps.detach(), **{f"d{k}": g for k, g in zip(wanted, grads, strict=True)}}

    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, case["tile"] * row)
        own = {"backend": backend, "workspace_bytes": case["kept"] * row}
        ours = with_threads(lambda: run(linear_token_logps, **own), case["threads"], False)
    plain, exact = run(reference.linear_token_logps), run(reference.linear_token_logps, wide=True)
    error, known = of_head(case, leaves, largest(grad), 0.0, case["temperature"])
    compare(ours, plain, exact, case["dtype"], {"logps": EPS + error, **known})


@pytest.mark.slow
@given(case=cases(**HEAD, **LOSS))
@fuzz(150)
def test_linear_dpo_loss(backend, case):
    rng = torch.Generator().manual_seed(case["seed"])
    where, bounds = layout(case, ["any", "any", "any", "ignored"])
    leaves, needs = head(case, len(where), rng)
    targets = torch.randint(case["v"], (len(where),), generator=rng)
    targets[[place == "ignored" for place in where]] = -100
    leaves["hidden"], targets = shaped(leaves["hidden"], case), shaped(targets, case)
    transform = {"logit_scale": case["scale"], "softcap": case["softcap"]}

    def whole(hidden, weight, targets, ref, *, bias=None, **options):
        return reference.dpo_loss(
            torch.nn.functional.linear(hidden, weight, bias), targets, ref, **transform, **options
        )

    z = torch.nn.functional.linear(*(leaves[k].double() if k in leaves else None for k in ("hidden", "weight", "bias")))
    logps = summed(reference.token_logps(z, targets, **transform), bounds)
    ref, lengths = references(case, logps), scored_lengths(targets, -100, bounds)
    flat = {**leaves, "hidden": leaves["hidden"].reshape(-1, case["d"])}
    error, _ = of_head(case, flat, 0.0, 0.0)
    known, of_coef, coef = with_errors(case, logps, ref, lengths, error)
    # The gradient of the weight may be as large, and is in the type of the head.
    assume(case["dtype"] != torch.float16 or 2 * coef * largest(flat["hidden"]) < 65504)
    gradients = of_head(case, flat, coef, of_coef)[1]
    known |= {k: abs(case["loss_grad"]) * x for k, x in gradients.items()}
    row = case["v"] * case["dtype"].itemsize

    def run(function, wide=False, **more):
        given = None if ref is None else ref.double() if wide else ref
        options = {"cu_seqlens": bounds, **case["options"], **more}
        out, wanted = run_head(function, leaves, needs, targets, given, wide=wide, **options)
        return fields(out, case["loss_grad"], **wanted)

    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, case["tile"] * row)
        own = {"backend": backend, "workspace_bytes": case["kept"] * row, **transform}
        ours = with_threads(lambda: run(linear_dpo_loss, **own), case["threads"], False)
    plain, exact = run(whole), run(whole, wide=True)
    compare(ours, plain, exact, case["dtype"], known)
