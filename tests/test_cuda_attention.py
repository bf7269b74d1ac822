"""The CUDA attention paths: index arithmetic on the CPU with written-out kernels, the kernels themselves on a GPU."""

import pytest
import tiny
import torch

from dpo_fast.forest.attention import block_attention
from dpo_fast.forest.flex import flex_attention_forest
from dpo_fast.forest.packing import PrefixForest
from dpo_fast.forest.varlen import sum_over_readers, varlen_attention_forest


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def forest() -> PrefixForest:
    return PrefixForest.from_pairs(tiny.pairs(6, seed=4))


def inputs(rows, dtype=torch.float64, device="cpu", heads=4, kv=2, dk=12, dv=8):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, h, rows, d, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for h, d in ((heads, dk), (kv, dk), (kv, dv))
    ]


def written_out(q, k, v, forest, scale, window):
    """Varlen attention segment by segment, bottom-right causal."""
    outputs = []
    cu_q, cu_k = forest.cu_q.tolist(), forest.cu_k.tolist()
    for i in range(len(cu_q) - 1):
        qs, ks, vs = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        groups = q.shape[1] // k.shape[1]
        ks, vs = ks.repeat_interleave(groups, 1), vs.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", qs, ks) * scale
        distance = torch.arange(len(qs))[:, None] + len(ks) - len(qs) - torch.arange(len(ks))
        allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = scores.masked_fill(~allowed, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vs))
    return torch.cat(outputs)


def forward(q, k, v, forest, scale, window):
    return (written_out(q, k, v, forest, scale, window),)


def backward(grad, q, k, v, out, forest, scale, window):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again = written_out(*leaves, forest, scale, window)
    torch.testing.assert_close(again, out)
    return torch.autograd.grad(again, leaves, grad)


@pytest.mark.parametrize("window", [None, 4])
def test_varlen_gathers_and_scatters_as_blocks_do(window):
    f = forest()
    ours, theirs = inputs(f.rows), inputs(f.rows)
    a = varlen_attention_forest(*ours, f, 0.3, window, kernels=(forward, backward))
    b = block_attention(*theirs, f, 0.3, window).transpose(1, 2)
    torch.testing.assert_close(a, b)
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_sum_over_readers_is_index_add():
    f = forest()
    gradient = torch.randn(len(f.key_rows), 2, 3)
    want = torch.zeros(f.rows, 2, 3, dtype=torch.float64).index_add(0, f.key_rows, gradient.double())
    torch.testing.assert_close(sum_over_readers(gradient, f), want.float())
    assert torch.equal(sum_over_readers(gradient, f), sum_over_readers(gradient, f))


@pytest.mark.parametrize(("dk", "dv", "pads"), [(16, 16, 0), (12, 16, 2), (16, 8, 1), (12, 12, 3)])
def test_varlen_pads_only_what_is_too_narrow(monkeypatch, dk, dv, pads):
    """Head sizes that flash attention takes go to the kernel as they are."""
    f, padded = forest(), []
    plain = torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda x, width: padded.append(x) or plain(x, width))
    leaves = inputs(f.rows, dk=dk, dv=dv)
    out = varlen_attention_forest(*leaves, f, 0.3, kernels=(forward, backward))
    assert len(padded) == pads
    torch.testing.assert_close(out, block_attention(*leaves, f, 0.3).transpose(1, 2))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_flex_computes_the_same_function(window, softcap, sinks):
    f = forest()
    q, k, v = (x.detach().float() for x in inputs(f.rows, dk=8))
    s_aux = torch.randn(4) if sinks else None
    got = flex_attention_forest(q, k, v, f, 0.3, window, softcap, s_aux, compiled=False)
    want = block_attention(q.double(), k.double(), v.double(), f, 0.3, window, softcap, s_aux).transpose(1, 2)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("shape", [(4, 2, 64, 64), (4, 1, 40, 24), (3, 3, 128, 128)])
def test_flash_on_a_forest(dtype, window, shape):
    f = forest().to("cuda")
    heads, kv, dk, dv = shape
    ours = inputs(f.rows, dtype, "cuda", heads, kv, dk, dv)
    exact = [x.detach().double().requires_grad_() for x in ours]
    plain = [x.detach().requires_grad_() for x in ours]
    runs = []
    for leaves, attend in (
        (ours, lambda *x: varlen_attention_forest(*x, f, 0.3, window)),
        (exact, lambda *x: block_attention(*x, f, 0.3, window).transpose(1, 2)),
        (plain, lambda *x: block_attention(*x, f, 0.3, window).transpose(1, 2)),
    ):
        out = attend(*leaves)
        out.sum().backward()
        runs.append([out.detach().double(), *(x.grad.double() for x in leaves)])
    for got, want, usual in zip(*runs, strict=True):
        # At most twice the error of plain SDPA in the same type, plus its unit of rounding.
        assert (got - want).norm() <= 2 * (usual - want).norm() + 1e-3 * want.norm()


@pytest.mark.gpu
def test_flash_gives_the_same_bits_twice_where_torch_is_told_so(deterministic):
    """By default its backward pass adds the gradient of q with atomics."""
    f = forest().to("cuda")
    grads = []
    for _ in range(2):
        leaves = inputs(f.rows, torch.bfloat16, "cuda", 4, 2, 64, 64)
        varlen_attention_forest(*leaves, f, 0.3).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_flex_on_a_gpu_has_gradients(softcap, sinks):
    f = forest().to("cuda")
    s_aux = torch.randn(4, device="cuda") if sinks else None
    leaves = inputs(f.rows, torch.float32, "cuda", 4, 2, 64, 64)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    flex_attention_forest(*leaves, f, 0.3, 4, softcap, s_aux).square().sum().backward()
    block_attention(*exact, f, 0.3, 4, softcap, s_aux).square().sum().backward()
    for a, b in zip(leaves, exact, strict=True):
        assert (a.grad.double() - b.grad).norm() <= 1e-2 * b.grad.norm()
