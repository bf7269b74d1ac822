"""The ops that hold the output layer: what a row of the table cannot say. Loss scales, autocast, and how much memory they hold."""

import pytest
import torch
from op_options import TRANSFORMS
from op_tools import poison, small_tiles  # noqa: F401 - poison is a fixture
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast import linear_token_logps, reference
from dpo_fast.backends import eager
from dpo_fast.ops import head as head_ops
from dpo_fast.ops.tiles import OutputLayer

pytestmark = pytest.mark.usefixtures("poison")

NAMES = ("hidden", "weight", "bias")
ALL = eager.OUTPUTS


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


def few_rows(monkeypatch, v, rows, itemsize=8):
    """Tiles of `rows` rows; returns the workspace that keeps as many."""
    small_tiles(monkeypatch, rows * v * itemsize)
    return rows * v * itemsize


def errors(result, exact):
    out = {}
    for name, x in result.items():
        if x.dtype != torch.bool:
            out[name] = ((x.double() - exact[name]).abs().max() / exact[name].abs().max()).item()
    return out


def test_outputs_do_not_change_the_gradients():
    batch = data(9, 4, 15)
    for needs in (("hidden",), NAMES):
        bare, full = (run(linear_token_logps, *batch, needs=needs, outputs=o) for o in ((), ALL))
        assert all(torch.equal(bare[k], full[k]) for k in bare)


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

    head_ops_forward = head_ops._linear_token_logps.function
    monkeypatch.setattr(head_ops, "_linear_token_logps", Function.apply)


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
