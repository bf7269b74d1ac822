"""The one launch of the loss of logits: programs that wait for each other, batches of any shape, memory beside the rows.

Where these tests run: test_kernels.py.
"""

import functools
import multiprocessing

import pytest
import torch
from kernel_tools import DEVICE, PLAIN, close, data, on_device, plain_torch
from op_tools import INTERPRETED, poison  # noqa: F401 - poison is a fixture

from dpo_fast.loss_table import LOSSES
from dpo_fast.losses import preference_loss

triton = pytest.importorskip("triton", reason="no triton on this machine")
from dpo_fast.kernels import dpo, logps  # noqa: E402
from dpo_fast.kernels.pair_losses import PAIR_LOSSES  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")


def rounded(x, dtype):
    """float32 x as the kernels write it: the interpreter rounds to bfloat16 toward zero, a GPU to nearest."""
    if INTERPRETED and dtype == torch.bfloat16:
        x = (x.contiguous().view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


def pairs(lengths, v, dtype, seed=0, spread=2.0):
    """Logits, targets (some ignored), bounds of the sequences and reference log-probs near the policy's."""
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    logits, targets = data(int(cu[-1]), v, dtype, seed, spread)
    ref = -6.0 * torch.tensor(lengths) * 0.7 + torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed))
    return logits, targets, cu.to(DEVICE), ref.to(DEVICE)


def plain_dpo(logits, targets, cu, ref, wide, grad_scale, loss_type, **options):
    leaf, token_logps, _ = plain_torch(logits, targets, PLAIN, wide)
    bounds = list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))
    summed = torch.stack([token_logps[a:b].sum() for a, b in bounds])
    lengths = torch.stack([(targets[a:b] != -100).sum() for a, b in bounds])
    chosen, rejected = summed.chunk(2)
    refs = (None, None) if ref is None else ref.to(wide).chunk(2)
    by_name = dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True))
    losses = preference_loss(chosen, rejected, *refs, loss_type=loss_type, **options, **by_name).losses
    (grad,) = torch.autograd.grad(losses.sum() * grad_scale, leaf)
    return losses.detach(), summed.detach(), rounded(grad, logits.dtype) if wide == torch.float32 else grad


def fused(logits, targets, cu, ref, grad_scale=1.0, loss_type="sigmoid", out=None, beta=0.1, **options):
    smoothing = options.pop("label_smoothing", 0.0)
    out = torch.empty_like(logits) if out is None else out
    return dpo.dpo_fused(
        logits, targets, cu, ref, grad_scale, loss_type=loss_type, beta=beta, label_smoothing=smoothing,
        **{"discopop_tau": 0.05, "simpo_gamma": 0.5, **options}, ignore_index=-100, out=out,
    )  # fmt: skip


def check_dpo(batch, grad_scale=0.5, loss_type="sigmoid", **options):
    dtype = batch[0].dtype
    losses, summed, out = fused(*batch, grad_scale, loss_type, **options)
    number = float(grad_scale)
    truth = plain_dpo(*batch, torch.float64, number, loss_type, **options)
    plain = plain_dpo(*batch, torch.float32, number, loss_type, **options)
    for name, x, p, t, kind in zip(
        ("losses", "logps", "gradient"),
        (losses, summed, out),
        plain,
        truth,
        (torch.float32,) * 2 + (dtype,),
        strict=True,
    ):
        close(x, p, t, kind, f"{loss_type} {name}")
    assert (out[batch[1] == -100] == 0).all()
    return losses, summed, out


def test_the_losses_of_one_pair_are_all_there():
    by_pair = {name for name, row in LOSSES.items() if not row.over_batch and not row.token_mean}
    assert set(PAIR_LOSSES) == by_pair


@on_device
@pytest.mark.parametrize("lengths", [[9, 2], [0, 0, 4, 3, 0, 2], [1] * 10], ids=str)
@pytest.mark.parametrize("programs", [1, 2, 64])
def test_shapes_of_a_batch(monkeypatch, lengths, programs):
    """Pairs of any size (empty ones too), whatever the size of the grid says of the order of the tickets."""
    if INTERPRETED:
        monkeypatch.setattr(dpo, "program_count", lambda device, per_sm: programs)
    check_dpo(pairs(lengths, 19, torch.float32))


@on_device
def test_equal_policy_and_reference_start_at_log_2():
    logits, targets, cu, _ = pairs([3, 4, 2, 5], 50, torch.bfloat16)
    _, summed, _ = fused(logits, targets, cu, None)
    losses, _, _ = fused(logits, targets, cu, summed)
    torch.testing.assert_close(losses, torch.full_like(losses, 2.0).log(), rtol=2e-7, atol=0)


@on_device
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)])
def test_gradient_scale_and_no_reference(scale):
    logits, targets, cu, _ = pairs([2, 3], 21, torch.float32)
    check_dpo((logits, targets, cu, None), scale.to(DEVICE) if isinstance(scale, torch.Tensor) else scale)


@on_device
@pytest.mark.parametrize(("v", "more"), [(96, 0), (96, 8), (101, 3), (101, 0)])
def test_in_place_and_strided(v, more):
    """The words beside the rows stay untouched; out of place and in place give the same bits."""
    logits, targets, cu, ref = pairs([2, 3, 1, 2], v, torch.bfloat16)
    wide = torch.full((len(logits), v + more), torch.nan, dtype=logits.dtype, device=DEVICE)
    wide[:, :v] = logits
    expected = check_dpo((wide[:, :v], targets, cu, ref))
    for x, y in zip(fused(wide[:, :v], targets, cu, ref, 0.5, out=wide[:, :v]), expected, strict=True):
        assert torch.equal(x, y)
    assert wide[:, v:].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter, where every row of the table runs twice")
def test_same_bits_twice():
    logits, targets, cu, ref = pairs([40, 3, 17, 29, 60, 8], 50257, torch.bfloat16)
    first = fused(logits, targets, cu, ref)
    for _ in range(20):
        for x, y in zip(first, fused(logits, targets, cu, ref), strict=True):
            assert torch.equal(x, y)
    options = {"ignore_index": -100, **PLAIN}
    a, b = (logps.logps_fwd(logits, targets, outputs=logps.OUTPUTS, **options) for _ in range(2))
    for x, y in zip((*a[:2], *a[2].values()), (*b[:2], *b[2].values()), strict=True):
        assert torch.equal(x, y)


@on_device
def test_one_launch(monkeypatch):
    """Forward, losses, coefficients and gradient are one launch of a Triton kernel (after the counters' memset)."""
    launched = []
    kind = type(dpo._dpo_kernel)
    run = kind.run

    @functools.wraps(run)
    def counting(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counting)
    fused(*pairs([3, 4, 2, 5], 33, torch.float32))
    assert launched == ["_dpo_kernel"]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs programs at once by itself")
@pytest.mark.parametrize("lengths", [[4, 6, 1, 9, 3, 2], [1] * 16, [12, 12]], ids=str)
def test_programs_that_wait_for_each_other(monkeypatch, lengths):
    """Four processes with the memory of one launch between them: no deadlock, the bits of one program after the other."""
    batch = pairs(lengths, 300, torch.float32)
    expected = fused(*batch)
    kernel, recorded = dpo._dpo_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **constants: recorded.extend((args, constants))

    monkeypatch.setattr(dpo, "_dpo_kernel", Recorder())
    ours = fused(*batch)
    args, constants = recorded
    for x in args:
        if isinstance(x, torch.Tensor):
            x.share_memory_()
    # The interpreter works on CPU memory itself; its copy back at the end would undo what the others write meanwhile.
    monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    fork = multiprocessing.get_context("fork")
    programs = [fork.Process(target=kernel[(1,)], args=args, kwargs=constants) for _ in range(4)]
    for program in programs:
        program.start()
    for program in programs:
        program.join(timeout=60)
        program.kill()
        program.join()
        assert program.exitcode == 0
    for x, y in zip(ours, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
def test_more_than_two_billion_logits():
    n, v = 16500, 131072
    logits = torch.randn(n, v, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.randint(v, (n,), device=DEVICE)
    targets[: n // 2] = -100
    cu = torch.tensor([0, 4000, n - 5000, n - 600, n], dtype=torch.int32, device=DEVICE)
    expected = logits[-3:].double().log_softmax(-1)
    onehot = torch.nn.functional.one_hot(targets[-3:], v)
    ours, _, _ = logps.logps_fwd(logits, targets, ignore_index=-100, outputs=(), **PLAIN)
    torch.testing.assert_close(ours[-3:].double(), expected.gather(1, targets[-3:, None])[:, 0], rtol=1e-5, atol=1e-5)
    losses, summed, _ = fused(logits, targets, cu, None, loss_type="nca_pair", out=logits)
    assert losses.isfinite().all()
    torch.testing.assert_close(summed[3], ours[n - 600 :].sum(), rtol=1e-5, atol=1e-5)
    coef = 0.5 * 0.1 * torch.sigmoid(0.1 * summed[3].double())
    torch.testing.assert_close(logits[-3:].double(), coef * (onehot - expected.exp()), rtol=1e-2, atol=1e-12)
    assert (logits[: n // 2] == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after the other")
@pytest.mark.parametrize(
    "lengths", [[300, 2, 1, 500, 40, 7, 900, 3], [1] * 512, [2000, 2000]], ids=["mixed", "tiny", "one"]
)
def test_many_programs_at_once(lengths):
    """Programs that wait for each other: no deadlock, the same bits as row by row, many times."""
    logits, targets, cu, ref = pairs(lengths, 8192, torch.bfloat16)
    first = check_dpo((logits, targets, cu, ref))
    for _ in range(50):
        for x, y in zip(first, fused(logits, targets, cu, ref, 0.5), strict=True):
            assert torch.equal(x, y)
