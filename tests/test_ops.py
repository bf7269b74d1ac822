"""`token_logps`, `sequence_logps`, `linear_token_logps` against whole logits: values, every gradient, precision, memory."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_tools import FLOORS, HALF, assert_within_rule, pairs, poison, small_tiles  # noqa: F401 - poison is autouse
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast import reference
from dpo_fast.backends import eager
from dpo_fast.backends.sequences import segment_ids, segment_sum
from dpo_fast.ops import WORKSPACE_BYTES, linear_token_logps, sequence_logps, token_logps
from dpo_fast.ops import head as head_ops
from dpo_fast.ops.tiles import OutputLayer, as_columns, workspace_rows

pytestmark = pytest.mark.usefixtures("poison")

NAMES = ("hidden", "weight", "bias")
ALL = eager.OUTPUTS
SHAPES = [(1, 5, 7), (13, 7, 31), (20, 8, 64), (37, 3, 101), (3, 1, 2), (5, 2, 1)]  # N, D, V
TRANSFORMS = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "all": {"logit_scale": -1.5, "softcap": 2.5, "temperature": 1.9},
}


def data(n, d, v, bias=True, dtype=torch.float64, seed=0, scale=1.0):
    """Leaves, targets and the gradient of the log-probs (some rows with none, as tokens common to a pair have)."""
    rng = torch.Generator().manual_seed(seed)
    leaves = {
        "hidden": scale * torch.randn(n, d, generator=rng, dtype=torch.float64),
        "weight": torch.randn(v, d, generator=rng, dtype=torch.float64),
        "bias": torch.randn(v, generator=rng, dtype=torch.float64),
    }
    if not bias:
        del leaves["bias"]
    targets = torch.randint(v, (n,), generator=rng)
    grad = torch.randn(n, generator=rng, dtype=torch.float64)
    grad[1::5] = 0
    return {k: x.to(dtype) for k, x in leaves.items()}, targets, grad


def run(function, leaves, targets, grad, needs=NAMES, outputs=(), **options):
    """Log-probs, statistics and the gradients of the leaves in `needs`, all by name."""
    leaves = {k: x.detach().requires_grad_(k in needs) for k, x in leaves.items()}
    hidden, weight = leaves["hidden"], leaves["weight"]
    out = function(hidden, weight, targets, bias=leaves.get("bias"), outputs=outputs, **options)
    logps, stats = out if isinstance(out, tuple) else (out, {})
    result = {"logps": logps, **stats}
    wanted = [k for k in leaves if k in needs]
    if wanted:
        grads = torch.autograd.grad(logps, [leaves[k] for k in wanted], grad.to(logps.dtype))
        result |= {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}
    else:
        assert not logps.requires_grad
    assert not any(x.requires_grad for x in stats.values())
    return {k: x.detach() for k, x in result.items()}


def agree(ours, theirs, rtol=1e-11):
    """Equal within `rtol` of the largest entry (float64 sums in another order)."""
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        y = theirs[name]
        assert x.dtype == y.dtype, name
        assert x.shape == y.shape, name
        if x.dtype == torch.bool:
            assert torch.equal(x, y), name
        else:
            size = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * max(size, 1e-3), msg=lambda m, n=name: f"{n}: {m}")


def few_rows(monkeypatch, v, rows, itemsize=8):
    """Tiles of `rows` rows; returns the workspace that keeps as many."""
    small_tiles(monkeypatch, rows * v * itemsize)
    return rows * v * itemsize


# ---- Values and gradients in float64 ----


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape, bias, transform):
    batch = data(*shape, bias)
    options = {**TRANSFORMS[transform], "outputs": ALL}
    agree(run(linear_token_logps, *batch, **options), run(reference.linear_token_logps, *batch, **options))


@pytest.mark.parametrize("needs", [n for k in range(4) for n in itertools.combinations(NAMES, k)])
@pytest.mark.parametrize("kept_rows", [0, 6, 1000])
def test_every_subset_of_gradients_in_chunks(monkeypatch, needs, kept_rows):
    """Four rows a tile; no, some or all rows kept for backward."""
    batch = data(21, 5, 33)
    few_rows(monkeypatch, 33, 4)
    options = {**TRANSFORMS["all"], "outputs": ALL, "needs": needs}
    ours = run(linear_token_logps, *batch, workspace_bytes=kept_rows * 33 * 8 + 7, **options)
    agree(ours, run(reference.linear_token_logps, *batch, **options))


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight"), NAMES])
@pytest.mark.parametrize("tile", [1, 100])
def test_a_tile_smaller_than_a_row(monkeypatch, needs, tile):
    batch = data(5, 3, 17)
    small_tiles(monkeypatch, tile)
    ours = run(linear_token_logps, *batch, needs=needs, workspace_bytes=2 * 17 * 8)
    agree(ours, run(reference.linear_token_logps, *batch, needs=needs))


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
@pytest.mark.parametrize("transform", ["plain", "all"])
def test_gradcheck(monkeypatch, needs, transform):
    leaves, targets, _ = data(4, 3, 6)
    few_rows(monkeypatch, 6, 3)
    leaves = {k: x.requires_grad_(k in needs) for k, x in leaves.items()}

    def function(hidden, weight, bias):
        options = {**TRANSFORMS[transform], "workspace_bytes": 2 * 6 * 8}
        return linear_token_logps(hidden, weight, targets, bias=bias, **options)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("name", ALL)
def test_one_output_alone(name):
    batch = data(9, 4, 15)
    for options in TRANSFORMS.values():
        ours = run(linear_token_logps, *batch, outputs=(name,), **options)
        agree(ours, run(reference.linear_token_logps, *batch, outputs=(name,), **options))
    assert (ours[name].dtype == torch.bool) == (name == "is_top1")


def test_outputs_do_not_change_the_gradients():
    batch = data(9, 4, 15)
    for needs in (("hidden",), NAMES):
        bare, full = (run(linear_token_logps, *batch, needs=needs, outputs=o) for o in ((), ALL))
        assert all(torch.equal(bare[k], full[k]) for k in bare)


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
def test_non_contiguous_input(needs):
    leaves, targets, grad = data(12, 6, 19)
    strided = {
        "hidden": leaves["hidden"].t().contiguous().t(),
        "weight": leaves["weight"].repeat_interleave(2, dim=1)[:, ::2],
        "bias": leaves["bias"].repeat_interleave(3)[::3],
    }
    assert not any(x.is_contiguous() for x in strided.values())
    spread = targets.repeat_interleave(2)[::2]
    agree(
        run(linear_token_logps, strided, spread, grad, needs=needs, outputs=ALL),
        run(reference.linear_token_logps, leaves, targets, grad, needs=needs, outputs=ALL),
    )


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
def test_one_hidden_row_repeated_and_a_scalar_gradient(needs):
    """An expanded input, and the expanded gradient that `sum()` hands back."""
    leaves, targets, _ = data(1, 6, 19)
    targets = torch.arange(8)
    results = []
    for function in (linear_token_logps, reference.linear_token_logps):
        x = {k: v.clone().requires_grad_(k in needs) for k, v in leaves.items()}
        out = function(x["hidden"].expand(8, 6), x["weight"], targets, bias=x["bias"])
        logps = out[0] if isinstance(out, tuple) else out
        (logps.sum() * -3.0).backward()
        results.append({"logps": logps.detach(), **{k: x[k].grad for k in needs}})
    agree(*results)


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
@pytest.mark.parametrize("kept_rows", [0, 5, 50])
def test_same_bits_twice(monkeypatch, needs, kept_rows):
    batch = data(23, 8, 65, dtype=torch.float32)
    few_rows(monkeypatch, 65, 4, 4)
    one, two = (
        run(linear_token_logps, *batch, needs=needs, outputs=ALL, workspace_bytes=kept_rows * 65 * 4) for _ in range(2)
    )
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
def test_backward_may_run_again(monkeypatch, needs):
    """The first pass computes rows past the workspace in it, and spends what it keeps."""
    few_rows(monkeypatch, 15, 4)
    tiles, tile = [], OutputLayer.tile

    def recorded(self, n, workspace):
        tiles.append(tile(self, n, workspace))
        return tiles[-1]

    monkeypatch.setattr(OutputLayer, "tile", recorded)
    leaves, targets, grad = data(9, 4, 15)
    leaves = {k: x.requires_grad_(k in needs) for k, x in leaves.items()}
    wanted = [leaves[k] for k in needs]
    options = {"bias": leaves["bias"], "workspace_bytes": 4 * 15 * 8}
    logps = linear_token_logps(leaves["hidden"], leaves["weight"], targets, **options)
    first = torch.autograd.grad(logps, wanted, grad, retain_graph=True)
    second = torch.autograd.grad(logps, wanted, 2 * grad)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-12, atol=1e-14)
    if "weight" in needs:
        places = [memory.data_ptr() for memory in tiles]
        assert places[0] == places[1]
        assert places[2] not in (0, places[0])


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
def test_a_second_derivative_is_refused(needs):
    leaves, targets, _ = data(4, 3, 6)
    leaves = {k: x.requires_grad_(k in needs) for k, x in leaves.items()}
    logps = linear_token_logps(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"])
    (g,) = torch.autograd.grad(logps.square().sum(), leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        g.sum().backward()


# ---- Extremes ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peaked_and_extreme_logits(dtype):
    """Logits up to thousands: the target has probability 1, or 1e-300 and less."""
    leaves, targets, grad = data(16, 5, 21, dtype=dtype, scale=1000.0)
    truth = {k: x.double() for k, x in leaves.items()}
    options = {"outputs": ALL}
    top = reference.linear_token_logps(truth["hidden"], truth["weight"], targets, bias=truth["bias"])[0]
    assert top.min() < -1000
    targets[:8] = (truth["hidden"] @ truth["weight"].T + truth["bias"]).argmax(-1)[:8]
    ours = run(linear_token_logps, leaves, targets, grad, **options)
    exact = run(reference.linear_token_logps, truth, targets, grad, **options)
    assert ours["is_top1"][:8].all()
    assert all(x.isfinite().all() for x in ours.values())
    # A logit of 5000 has an error of 3e-4 in float32, which is the error of its log-prob and its probability.
    agree(
        {k: v if v.dtype == torch.bool else v.double() for k, v in ours.items()},
        exact,
        rtol=1e-12 if dtype == torch.float64 else 1e-3,
    )


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_words_masked_by_an_infinite_bias(needs, transform):
    leaves, targets, grad = data(8, 4, 11)
    leaves["bias"][[2, 5]] = -math.inf
    targets[:] = torch.tensor([0, 1, 3, 4, 6, 7, 8, 2])  # the last target is masked itself
    options = {**TRANSFORMS[transform], "needs": needs, "outputs": ALL}
    if options.get("logit_scale", 1.0) < 0:
        options["logit_scale"] *= -1
    ours = run(linear_token_logps, leaves, targets, grad, **options)
    agree(ours, run(reference.linear_token_logps, leaves, targets, grad, **options))
    assert ours["entropy"].isfinite().all()
    assert not any(x.isnan().any() for x in ours.values())
    if "softcap" not in TRANSFORMS[transform]:
        assert ours["logps"][-1] == -math.inf
        assert ours["mean_logits"].eq(-math.inf).all()


def test_no_rows():
    batch = data(0, 4, 9)
    agree(run(linear_token_logps, *batch, outputs=ALL), run(reference.linear_token_logps, *batch, outputs=ALL))


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",), NAMES])
@pytest.mark.parametrize("grad_rows", [0, 1, 7, 12, 13])
@pytest.mark.parametrize("kept_rows", [0, 6, 1000])
def test_rows_without_a_gradient(monkeypatch, needs, grad_rows, kept_rows):
    """They are scored as ever, keep nothing, and their coefficients are not looked at."""
    leaves, targets, grad = data(13, 4, 9)
    few_rows(monkeypatch, 9, 3)
    zeroed = grad.clone()
    zeroed[grad_rows:] = 0
    wanted = run(linear_token_logps, leaves, targets, zeroed, needs=needs, outputs=ALL)
    kept = {"workspace_bytes": kept_rows * 9 * 8, "outputs": ALL}
    agree(run(linear_token_logps, leaves, targets, grad, needs=needs, grad_rows=grad_rows, **kept), wanted)


# ---- Half and single precision: at most twice plain torch's own error, plus a floor ----


def errors(result, exact):
    out = {}
    for name, x in result.items():
        if x.dtype != torch.bool:
            out[name] = ((x.double() - exact[name]).abs().max() / exact[name].abs().max()).item()
    return out


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("kept_rows", [0, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_precision(monkeypatch, dtype, kept_rows, transform, needs, backend):
    leaves, targets, grad = data(64, 32, 257, dtype=dtype)
    few_rows(monkeypatch, 257, 9, 4)
    options = {**TRANSFORMS[transform], "needs": needs, "outputs": ALL}
    exact = run(reference.linear_token_logps, {k: x.double() for k, x in leaves.items()}, targets, grad, **options)
    plain = run(reference.linear_token_logps, leaves, targets, grad, **options)
    kept = kept_rows * 257 * dtype.itemsize
    ours = run(linear_token_logps, leaves, targets, grad, workspace_bytes=kept, backend=backend, **options)
    assert ours["logps"].dtype == torch.float32
    assert all(ours[f"d{k}"].dtype == dtype for k in needs)
    # The most likely word can be another one in half precision.
    exact["is_top1"] = plain["is_top1"]
    assert_within_rule(ours, plain, exact, FLOORS[dtype])


def test_gradients_of_many_chunks_are_summed_in_float32(monkeypatch):
    """A bf16 head, 512 chunks: sums rounded to bf16 would lose a third of the gradient."""
    leaves, targets, _ = data(512, 4, 9, dtype=torch.bfloat16)
    leaves["hidden"][:] = 1.0
    targets[:] = 3
    few_rows(monkeypatch, 9, 1, 4)
    grad = torch.ones(512)
    exact = run(reference.linear_token_logps, {k: x.double() for k, x in leaves.items()}, targets, grad)
    ours = run(linear_token_logps, leaves, targets, grad, workspace_bytes=0)
    assert errors(ours, exact)["dweight"] < 2**-8
    assert errors(ours, exact)["dbias"] < 2**-8


@pytest.mark.parametrize("kept_rows", [0, 10])
def test_hidden_states_times_a_loss_scale_need_not_fit_float16(kept_rows, backend):
    """40 * 4000 is more than 65504; the gradient, of targets with probability 0.997, is small. And 1e-7 of it is too."""
    targets = torch.tensor([0, 1, 2, 3, 1])
    leaves = {"hidden": 40 * torch.eye(4)[targets], "weight": torch.zeros(9, 4), "bias": torch.zeros(9)}
    leaves["weight"][:4] = 0.2 * torch.eye(4)
    leaves = {k: x.half() for k, x in leaves.items()}
    for grad in (torch.full((5,), 4000.0), torch.full((5,), 4e-4)):
        exact = run(reference.linear_token_logps, {k: x.double() for k, x in leaves.items()}, targets, grad)
        ours = run(linear_token_logps, leaves, targets, grad, workspace_bytes=kept_rows * 9 * 2, backend=backend)
        assert errors(ours, exact)["dweight"] < 2**-8


def test_small_coefficients_of_many_float16_rows(backend):
    """The gradient is 201.6; the sum of the rows without their coefficients is 1000 times as much."""
    leaves = {"hidden": torch.full((2048, 1), 100.0), "weight": torch.zeros(64, 1)}
    leaves = {k: x.half() for k, x in leaves.items()}
    leaves["weight"].requires_grad_()
    targets = torch.zeros(2048, dtype=torch.int64)
    logps = linear_token_logps(leaves["hidden"], leaves["weight"], targets, backend=backend)
    logps.backward(torch.full((2048,), 1e-3))
    assert leaves["weight"].grad[0].item() == pytest.approx(2048 * 100 * 1e-3 * (1 - 1 / 64), rel=1e-2)


def test_mean_logits_of_a_row_whose_first_words_are_masked(backend):
    logits = torch.randn(2, 4500)
    logits[:, :2048] = -math.inf
    logits[1] = logits[1].flip(0)
    stats = token_logps(logits, torch.tensor([4000, 3]), outputs=ALL, backend=backend)[1]
    assert stats["mean_logits"].eq(-math.inf).all()
    assert stats["entropy"].isfinite().all()


@pytest.mark.parametrize("needs", [(), ("hidden",), NAMES])
def test_autocast_runs_the_head_in_bf16_and_the_rest_in_fp32(needs):
    leaves, targets, grad = data(20, 16, 65, dtype=torch.float32)
    half = {k: x.bfloat16() for k, x in leaves.items()}
    leaves["bias"] = half["bias"].float()
    options = {"needs": needs, "outputs": ALL, "temperature": 0.9}
    plain = run(linear_token_logps, half, targets, grad, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Backward inside the context too, where some loops call it.
        cast = run(linear_token_logps, leaves, targets, grad, **options)
        mixed = run(linear_token_logps, {**leaves, "hidden": half["hidden"]}, targets, grad, **options)
    for result in (cast, mixed):
        assert all(result[k].dtype == torch.float32 for k in result if k not in ("is_top1", "dhidden"))
        assert all(torch.equal(result[k], plain[k].to(result[k].dtype)) for k in plain if k != "dbias")
        if "bias" in needs:
            # The gradient of a float32 bias is not rounded to bf16.
            torch.testing.assert_close(result["dbias"], plain["dbias"].float(), rtol=2**-8, atol=1e-6)


# ---- Memory ----


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any call returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


N, D, V, ROWS = 96, 4, 64, 8


def inside(monkeypatch):
    """The ops run as plain functions, so that a dispatch mode sees what they allocate."""
    monkeypatch.setattr(head_ops, "linear_token_logps_backward", head_ops.linear_token_logps_backward.function)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = head_ops_forward(*inputs)
            head_ops._save(ctx, inputs, output)
            return output

        backward = staticmethod(head_ops._backward)

    head_ops_forward = head_ops.linear_token_logps.function
    monkeypatch.setattr(head_ops, "linear_token_logps", Function.apply)


def largest(monkeypatch, function, dtype=torch.float64, grad_mode=True, **options):
    few_rows(monkeypatch, V, ROWS, dtype.itemsize)
    inside(monkeypatch)
    batch = data(N, D, V, dtype=dtype)
    if not grad_mode:
        leaves, targets, _ = batch
        leaves = {k: x.requires_grad_() for k, x in leaves.items()}
        with Largest() as mode, torch.no_grad():
            function(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], **options)
        return mode.numel
    with Largest() as mode:
        run(function, *batch, **options)
    return mode.numel


def test_a_frozen_head_never_holds_more_than_a_tile(monkeypatch):
    assert largest(monkeypatch, reference.linear_token_logps, needs=("hidden",)) == N * V
    monkeypatch.undo()
    for transform in TRANSFORMS.values():
        assert largest(monkeypatch, linear_token_logps, needs=("hidden",), outputs=ALL, **transform) == ROWS * V
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kept_rows", "rows"), [(0, ROWS), (3 * ROWS, 3 * ROWS), (ROWS + 3, ROWS + 2)])
def test_a_trained_head_keeps_no_more_than_the_workspace(monkeypatch, dtype, kept_rows, rows):
    kept = kept_rows * V * dtype.itemsize
    numel = largest(monkeypatch, linear_token_logps, dtype, workspace_bytes=kept, needs=NAMES, outputs=ALL)
    assert numel == rows * V


def test_the_bias_gradient_makes_no_wide_copy_of_the_workspace(monkeypatch):
    """bf16 rows in the workspace, their float32 copies a tile at a time."""
    widest = 0

    class Wide(Largest):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal widest
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                widest = max(widest, out.numel())
            return out

    few_rows(monkeypatch, V, ROWS, 2)
    monkeypatch.setattr(eager, "ROW_BYTES", ROWS * V * 4)
    inside(monkeypatch)
    batch = data(N, D, V, dtype=torch.bfloat16)
    with Wide():
        run(linear_token_logps, *batch)
    assert widest == ROWS * V


def test_without_gradients_nothing_is_kept(monkeypatch):
    """A trainable model under no_grad (evaluation, reference log-probs) needs no workspace."""
    assert largest(monkeypatch, linear_token_logps, grad_mode=False) == ROWS * V


@given(n=st.integers(0, 70_000), limit=st.integers(0, 9000))
def test_chunks_are_whole_steps_and_leave_no_single_row(n, limit):
    rows = eager.whole_steps(limit) or eager.ROW_STEP
    parts = eager.chunks(n, rows)
    assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])][: len(parts)]
    assert parts[-1][1] == n if n else not parts
    sizes = [b - a for a, b in parts]
    assert all(0 < size <= rows for size in sizes)
    assert all(size % 128 == 0 for size in sizes[:-1]) or (rows == 128 and sizes[-2:] == [127, 2])
    assert sum(size < rows for size in sizes) <= 2
    assert 1 not in sizes or n == 1


@given(
    v=st.integers(1, 1 << 21), dtype=st.sampled_from([*HALF, torch.float32]), device=st.sampled_from(["cpu", "cuda"])
)
def test_tiles_are_whole_steps_that_fit(v, dtype, device):
    rows = eager.tile_rows(v, dtype, device)
    most = eager.TILE_BYTES[device] // (v * dtype.itemsize)
    assert rows % 128 == 0
    assert rows % 256 == 0 or rows == 128
    assert most - 255 <= rows <= max(most, 128)


@given(n=st.integers(0, 20_000), limit=st.integers(0, 9000))
def test_a_workspace_keeps_everything_or_whole_steps(n, limit):
    kept = eager.rows_within(n, limit)
    assert kept <= min(n, limit)
    assert kept == n or kept % 128 == 0 or (kept, n) == (127, 129)
    assert n - kept != 1 or n == 1
    assert kept == n or limit - kept < 256 + 128


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_coefficients_as_columns_keep_their_digits(dtype):
    """The bias gradient is one product with them: in half precision two columns hold a float32's first 16 bits."""
    wide = eager.wide_dtype(dtype)
    coef = torch.randn(300, 1, dtype=wide, generator=torch.Generator().manual_seed(0))
    columns = as_columns(coef, dtype)
    assert columns.dtype == dtype
    error = (columns.double().sum(1, keepdim=True) - coef.double()).abs() / coef.double().abs()
    assert error.max() <= (2**-15 if dtype in HALF else 0)


def test_rows_of_the_reference_shape():
    """V 128256 in bf16 on a GPU: 1,024 rows of a frozen output layer at a time, 4,096 of a trained one."""
    assert eager.tile_rows(128256, torch.bfloat16, "cuda") == 1024
    assert (
        eager.rows_within(16384, workspace_rows(torch.empty(128256, 0, dtype=torch.bfloat16), WORKSPACE_BYTES)) == 4096
    )
    assert eager.chunks(0, 1024) == []
    assert eager.chunks(2500, 1024) == [(0, 1024), (1024, 2048), (2048, 2500)]
    assert eager.chunks(2049, 1024) == [(0, 1024), (1024, 1920), (1920, 2049)]


# ---- Refusals ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(1, 1, 4, 3)}, r"hidden must be \[N, D\] or \[S, T, D\]"),
        ({"weight": torch.zeros(6, 2)}, r"got \(4, 3\) and \(6, 2\)"),
        ({"weight": torch.zeros(6)}, r"weight \[V, D\]"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets must be int64 \[4\]"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "got torch.int32"),
        ({"targets": torch.tensor([0, 1, 2, 6])}, r"targets lie in \[0, 6\], outside the vocabulary \[0, 6\)"),
        ({"targets": torch.tensor([0, 1, 2, -100]), "ignore_index": None}, r"targets lie in \[-100, 2\]"),
        ({"targets": torch.tensor([0, 1, 2, -1])}, r"outside the vocabulary \[0, 6\) and are not ignore_index=-100"),
        ({"bias": torch.zeros(5)}, r"bias must be \[6\]"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"outputs": ("entropy", "perplexity")}, r"outputs \['perplexity'\] are not among entropy, "),
        ({"outputs": "entropy"}, "outputs must be a tuple of names"),
        ({"grad_rows": 5}, r"grad_rows is 5: give a number of rows in \[0, 4\]"),
        ({"grad_rows": -1}, "grad_rows is -1"),
        ({"weight": torch.zeros(6, 3, dtype=torch.bfloat16)}, "cast one of them"),
    ],
)
def test_refusals(change, message):
    call = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(6, 3), "targets": torch.tensor([0, 1, 2, 5])}
    assert linear_token_logps(**call).shape == (4,)
    with pytest.raises(ValueError, match=message):
        linear_token_logps(**{**call, **change})


# ---- Logits in ----


def run_tokens(function, logits, targets, grad=None, needs=True, **options):
    logits = logits.detach().requires_grad_(needs)
    out = function(logits, targets, **options)
    logps, stats = out if isinstance(out, tuple) else (out, {})
    found = {"logps": logps.detach(), **stats}
    if needs:
        (found["dlogits"],) = torch.autograd.grad(logps, logits, grad.to(logps.dtype))
    else:
        assert not logps.requires_grad
    assert not any(x.requires_grad for x in stats.values())
    return found


def token_truth(logits, targets, *, outputs=(), temperature=1.0, **transform):
    """Log-probs with their gradient, and statistics, of whole logits."""
    logps = reference.token_logps(logits, targets, temperature=temperature, **transform)
    wide = logits.detach().to(logps.dtype)
    z = reference.transform_logits(wide, *(transform.get(k, d) for k, d in (("logit_scale", 1.0), ("softcap", None))))
    stats = {name: reference.STATISTICS[name](z / temperature, targets, temperature) for name in outputs}
    return logps, {name: x.masked_fill(targets == -100, 0) for name, x in stats.items()}


LENGTHS = [(2, 3), (0, 1), (1, 4), (0, 5), (3, 0)]


def tokens(v=V, packed=False, dtype=torch.float64):
    logits, targets, cu = pairs(LENGTHS, v, packed=packed, dtype=dtype)
    grad = torch.randn(targets.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return logits, targets, cu, grad


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_token_logps_in_float64(transform, packed):
    logits, targets, _, grad = tokens(packed=packed)
    for outputs in ((), ALL, ("mean_logits",)):
        options = {**TRANSFORMS[transform], "outputs": outputs}
        agree(
            run_tokens(token_logps, logits, targets, grad, **options),
            run_tokens(token_truth, logits, targets, grad, **options),
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_token_logps(dtype, transform, packed, backend):
    logits, targets, _, grad = tokens(257, packed, dtype)
    options = {**TRANSFORMS[transform], "outputs": ALL}
    ours = run_tokens(token_logps, logits, targets, grad, backend=backend, **options)
    assert ours["dlogits"].dtype == dtype
    assert ours["logps"].dtype == torch.float32
    plain, exact = (run_tokens(token_truth, x, targets, grad, **options) for x in (logits, logits.double()))
    assert_within_rule(ours, plain, exact, FLOORS[dtype])
    for name, x in ours.items():
        assert x[targets == -100].eq(0).all(), name
    bare = run_tokens(token_logps, logits, targets, needs=False, backend=backend, **options)
    assert all(torch.equal(bare[k], ours[k]) for k in bare)


@pytest.mark.parametrize("v", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_token_logps_of_any_size(n, v, backend):
    logits, targets = torch.randn(n, v), torch.randint(v, (n,))
    grad = torch.randn(n)
    ours = run_tokens(token_logps, logits, targets, grad, backend=backend)
    plain, exact = (run_tokens(reference.token_logps, x, targets, grad) for x in (logits, logits.double()))
    assert_within_rule(ours, plain, exact, 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_token_logps_does_not_read_ignored_rows(packed, backend):
    logits, targets, _, grad = tokens(packed=packed, dtype=torch.float32)
    logits[targets == -100] = math.nan
    grad[targets == -100] = math.nan
    ours = run_tokens(token_logps, logits, targets, grad, outputs=ALL, backend=backend)
    assert all(x.isfinite().all() for x in ours.values())
    targets[:] = -100
    ours = run_tokens(token_logps, logits, targets, grad, outputs=ALL, backend=backend)
    assert all(x.eq(0).all() for x in ours.values())


@pytest.mark.parametrize("transform", ["plain", "temperature", "softcap"])
def test_token_logps_of_masked_words(transform, backend):
    logits, targets, _, grad = tokens(packed=True, dtype=torch.float32)
    logits[:, ::3] = -math.inf
    targets[targets >= 0] = targets[targets >= 0] // 3 * 3 - 2
    targets[(targets < 0) & (targets != -100)] = 1
    options = {**TRANSFORMS[transform], "outputs": ALL}
    ours = run_tokens(token_logps, logits, targets, grad, backend=backend, **options)
    plain, exact = (run_tokens(token_truth, x, targets, grad, **options) for x in (logits, logits.double()))
    assert_within_rule(ours, plain, exact, 1e-5)
    assert ours["dlogits"][:, ::3].eq(0).all()
    targets[0] = 0
    if transform != "softcap":
        assert token_logps(logits, targets.where(targets != 0, 0), backend=backend)[targets == 0].eq(-math.inf).all()


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_token_logps_of_peaked_rows(size, backend):
    """Probabilities of 1 and of exp(-size)."""
    logits, targets, _, grad = tokens(packed=True, dtype=torch.float32)
    rows = torch.arange(len(logits))
    logits[rows, targets.clamp(min=0)] = size * (rows % 3 - 1).float()
    ours = run_tokens(token_logps, logits, targets, grad, outputs=ALL, backend=backend)
    plain, exact = (run_tokens(token_truth, x, targets, grad, outputs=ALL) for x in (logits, logits.double()))
    assert_within_rule(ours, plain, exact, 1e-5)


def test_token_logps_in_blocks(monkeypatch):
    logits, targets, _, grad = tokens(packed=True)
    options = {**TRANSFORMS["all"], "outputs": ALL}
    whole = run_tokens(token_logps, logits, targets, grad, **options)
    monkeypatch.setattr(eager, "ROW_BYTES", 2 * V * 8)
    agree(run_tokens(token_logps, logits, targets, grad, **options), whole)


def test_token_logps_backward_may_run_again(backend):
    logits, targets, _, grad = tokens(packed=True, dtype=torch.float32)
    logits.requires_grad_()
    logps = token_logps(logits, targets, backend=backend)
    first = torch.autograd.grad(logps, logits, grad.float(), retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(logps, logits, grad.float())[0])
    logps = token_logps(logits, targets, backend=backend)
    (g,) = torch.autograd.grad(logps.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        g.sum().backward()


def test_token_logps_of_slices_and_strides(backend):
    whole = torch.randn(4, 6, 40)
    views = {
        "shifted": whole[:, :-1],
        "words": whole[..., :33],
        "transposed": whole.transpose(0, 1),
        "every second": whole[:, ::2, ::2],
        "expanded": whole[:1].expand(4, 6, 40),
        "row": whole[:, 0],
    }
    for name, view in views.items():
        targets = torch.randint(view.shape[-1], view.shape[:-1])
        targets.view(-1)[::3] = -100
        grad = torch.randn(targets.shape)
        ours, plain = (
            run_tokens(f, view, targets, grad, **o)
            for f, o in ((token_logps, {"outputs": ALL, "backend": backend}), (token_truth, {"outputs": ALL}))
        )
        for k, x in ours.items():
            assert x.shape == plain[k].shape, (name, k)
            torch.testing.assert_close(x, plain[k], rtol=1e-5, atol=1e-6, msg=lambda m, n=name, k=k: f"{n} {k}: {m}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sequence_logps(dtype, average, packed, backend):
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("kernels take no float64")
    logits, targets, cu, _ = tokens(packed=packed, dtype=dtype)
    options = {"average": average, "temperature": 0.8, "softcap": 5.0, "logit_scale": 0.7}

    def plain(logits, targets, *, average, **transform):
        logps = reference.token_logps(logits, targets, **transform)
        if packed:
            parts = [(logps[a:b].sum(), (targets[a:b] != -100).sum()) for a, b in itertools.pairwise(cu.tolist())]
            sums, counts = (torch.stack(x) for x in zip(*parts, strict=True))
        else:
            sums, counts = logps.sum(1), (targets != -100).sum(1)
        return sums / counts.clamp(min=1) if average else sums

    grad = torch.linspace(-1, 2, len(LENGTHS), dtype=torch.float64)
    ours = run_tokens(sequence_logps, logits, targets, grad, cu_seqlens=cu, backend=backend, **options)
    assert ours["logps"][-1] == 0
    found = (run_tokens(plain, x, targets, grad, **options) for x in (logits, logits.double()))
    assert_within_rule(ours, *found, FLOORS[dtype])


def test_segment_sums():
    values = torch.randn(20)
    cu = torch.tensor([0, 0, 3, 3, 11, 20, 20], dtype=torch.int32)
    expected = torch.stack([values[a:b].double().sum() for a, b in itertools.pairwise(cu.tolist())]).float()
    assert torch.equal(segment_sum(values, cu), expected)
    assert segment_ids(cu, 20).tolist() == [1] * 3 + [3] * 8 + [4] * 9
    assert segment_sum(values[:0], cu * 0).eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(6)}, r"logits must be floating-point \[N, V\] or \[S, T, V\]"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets must be int64 \[4\], one for each row of logits"),
        ({"targets": torch.tensor([0, 1, 2, 6])}, r"targets lie in \[0, 6\], outside the vocabulary \[0, 6\)"),
        ({"targets": torch.tensor([0, 1, 2, -1])}, "and are not ignore_index=-100"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"logit_scale": math.inf}, "logit_scale must be finite"),
        ({"outputs": ("entropy", "loss")}, r"outputs \['loss'\] are not among"),
        ({"outputs": "entropy"}, "outputs must be a tuple of names, got 'entropy'"),
        ({"backend": "fast"}, "backend is 'fast'"),
    ],
)
def test_token_refusals(change, message):
    call = {"logits": torch.zeros(4, 6), "targets": torch.tensor([0, 1, 2, 5])}
    assert token_logps(**call).shape == (4,)
    with pytest.raises(ValueError, match=message):
        token_logps(**{**call, **change})


def test_sequence_refusals():
    logits, targets = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="is packed: give cu_seqlens"):
        sequence_logps(logits, targets)
    with pytest.raises(ValueError, match="cu_seqlens must go up from 0 to the 4 rows, got"):
        sequence_logps(logits, targets, cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32))


# ---- The reference itself, against torch ----


def test_reference_token_logps():
    logits = torch.randn(3, 4, 7, dtype=torch.float64).requires_grad_()
    targets = torch.randint(7, (3, 4))
    targets[0, 1] = targets[2] = -100
    ours = reference.token_logps(logits, targets, temperature=0.8)
    theirs = -torch.nn.functional.cross_entropy(logits.transpose(1, 2) / 0.8, targets, reduction="none")
    torch.testing.assert_close(ours, theirs)
    assert ours[targets == -100].eq(0).all()
    (g,) = torch.autograd.grad(ours.sum(), logits)
    assert g[targets == -100].eq(0).all()


def test_reference_statistics_are_those_of_a_distribution():
    leaves, targets, _ = data(6, 4, 9)
    options = {"logit_scale": 0.5, "softcap": 2.0, "temperature": 1.3, "outputs": ALL}
    logps, stats = reference.linear_token_logps(leaves["hidden"], leaves["weight"], targets, **options)
    logits = 2 * torch.tanh(leaves["hidden"] @ leaves["weight"].T * 0.5 / 2)
    q = torch.distributions.Categorical(logits=logits / 1.3)
    torch.testing.assert_close(logps, q.log_prob(targets))
    torch.testing.assert_close(stats["entropy"], q.entropy())
    torch.testing.assert_close(stats["log_sum_sq_probs"], q.probs.square().sum(-1).log())
    torch.testing.assert_close(stats["mean_logits"], logits.mean(-1))
    assert torch.equal(stats["is_top1"], logits.argmax(-1) == targets)
