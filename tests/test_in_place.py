"""`dpo_loss(inplace=True)`: the gradient lies where the logits were, in memory of any width, and who needs them is told."""

import pytest
import torch
from op_tools import LENGTHS, fields, options_of, pairs, poison, ref_for  # noqa: F401 - poison is a fixture

from dpo_fast import dpo_loss

pytestmark = pytest.mark.usefixtures("poison")
V = 37


@pytest.mark.parametrize("name", ["sigmoid", "aot", "sft"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inplace(dtype, packed, name, backend):
    logits, targets, cu = pairs(LENGTHS, V, packed=packed, dtype=dtype)
    ref = ref_for(name, 8)
    results = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        x = leaf * 1.0
        out = dpo_loss(x, targets, ref, cu_seqlens=cu, backend=backend, inplace=inplace, **options_of(name))
        before = x.detach().clone()
        results.append(fields(out, 2.0, leaf=leaf))
        if inplace:
            assert torch.equal(x.detach(), results[-1]["dleaf"])
            torch.testing.assert_close(before * 2.0, results[-1]["dleaf"], rtol=0, atol=0)
        else:
            assert torch.equal(x.detach(), logits)
    for key, x in results[0].items():
        if dtype == torch.float32:
            assert torch.equal(x, results[1][key]), key
        else:
            # Without inplace it takes two launches, and the gradient is rounded once.
            torch.testing.assert_close(x, results[1][key], rtol=2e-3, atol=1e-6)


def test_inplace_takes_the_rows_of_a_wider_memory(backend):
    wide = torch.randn(12, 40)
    keep = wide[:, V:].clone()
    leaf = wide[:, :V].clone().requires_grad_()
    targets = torch.randint(V, (12,))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    expected = fields(dpo_loss(leaf, targets, cu_seqlens=cu, backend=backend), leaf=leaf)
    x = wide[:, :V].requires_grad_()
    ours = fields(dpo_loss(x, targets, cu_seqlens=cu, backend=backend, inplace=True), leaf=x)
    for key, y in ours.items():
        # Rows at other addresses may be summed in another order.
        torch.testing.assert_close(y, expected[key], rtol=1e-5, atol=1e-6, msg=key)
    assert torch.equal(wide[:, :V].detach(), ours["dleaf"])
    assert torch.equal(wide[:, V:], keep)


@pytest.mark.parametrize("words", [V, 1])
def test_inplace_takes_padded_rows_with_gaps(words, backend):
    """`logits[..., :V]` of a wider tensor, whose gradient backward multiplies where it lies."""
    wide = torch.randn(4, 3, 40)
    keep = wide[..., words:].clone()
    targets = torch.randint(words, (4, 3))
    leaf = wide[..., :words].clone().requires_grad_()
    expected = fields(dpo_loss(leaf, targets, backend=backend), -0.5, leaf=leaf)
    x = wide[..., :words].requires_grad_()
    ours = fields(dpo_loss(x, targets, backend=backend, inplace=True), -0.5, leaf=x)
    for key, y in ours.items():
        # Rows at other addresses may be summed in another order.
        torch.testing.assert_close(y, expected[key], rtol=1e-5, atol=1e-6, msg=key)
    assert torch.equal(x.detach(), ours["dleaf"])
    assert torch.equal(wide[..., words:], keep)


def test_inplace_is_noticed_by_whoever_saved_the_logits():
    leaf = torch.randn(4, 3, V).requires_grad_()
    x = leaf.exp()
    out = dpo_loss(x, torch.randint(V, (4, 3)), inplace=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.loss.backward()


def test_without_gradients_nothing_is_overwritten(backend):
    logits, targets, cu = pairs(LENGTHS, V, packed=True, dtype=torch.float32)
    x = logits.clone().requires_grad_()
    expected = fields(dpo_loss(x, targets, cu_seqlens=cu, backend=backend))
    for inplace in (False, True):
        with torch.no_grad():
            out = dpo_loss(x, targets, cu_seqlens=cu, backend=backend, inplace=inplace)
        bare = dpo_loss(logits, targets, cu_seqlens=cu, backend=backend, inplace=inplace)
        assert torch.equal(x.detach(), logits)
        for result in (out, bare):
            assert not result.loss.requires_grad
            for k, y in fields(result).items():
                torch.testing.assert_close(y, expected[k], rtol=1e-6, atol=1e-6)
