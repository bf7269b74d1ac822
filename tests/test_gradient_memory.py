"""Memory of large gradients on a CPU: the piece that was given back last is the next gradient's, page for page."""

import threading

import pytest
import torch
from op_tools import pairs

from dpo_fast import dpo_loss, token_logps

csrc = pytest.importorskip("dpo_fast.backends.extension", reason="the extension is not built")
resource = pytest.importorskip("resource", reason="page faults are counted on Unix")

LARGE = 3 << 20  # float32 numbers: 12 MB


def faults(call) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture
def empty():
    """Whatever was kept is in use: a test begins with fresh memory."""
    held = [csrc.new_empty(torch.zeros(1), 64 * LARGE)]
    yield
    held.clear()


def test_the_second_gradient_takes_no_fresh_pages(empty):
    like = torch.zeros(1)
    fresh = faults(lambda: csrc.new_empty(like, LARGE).fill_(1))
    assert fresh >= 5  # 12 MB are at least six huge pages, of which memory begins and ends inside
    assert faults(lambda: csrc.new_empty(like, 3, LARGE // 4).fill_(2)) <= 1  # smaller, and in it


def test_pieces_in_use_are_apart(empty):
    like = torch.zeros(1, dtype=torch.bfloat16)
    a, b = csrc.new_empty(like, 2, LARGE), csrc.new_empty(like, 2, LARGE)
    assert (a.dtype, a.shape, a.stride()) == (torch.bfloat16, (2, LARGE), (LARGE, 1))
    a.fill_(1)
    b.fill_(2)
    assert (a == 1).all()
    place = b.data_ptr()
    view = b[1:]
    del b
    assert csrc.new_empty(like, 2, LARGE).data_ptr() != place  # a view holds it
    del view
    assert csrc.new_empty(like, 2, LARGE).data_ptr() == place


def test_the_larger_piece_is_kept(empty):
    like = torch.zeros(1)
    small, large = csrc.new_empty(like, LARGE), csrc.new_empty(like, 2 * LARGE)
    place = large.data_ptr()
    del large, small
    assert csrc.new_empty(like, LARGE).data_ptr() == place
    small, large = csrc.new_empty(like, 2 * LARGE), csrc.new_empty(like, 4 * LARGE)
    place = large.data_ptr()
    del small, large
    assert csrc.new_empty(like, 4 * LARGE).data_ptr() == place


def test_from_many_threads(empty):
    wrong = []

    def run(number: int) -> None:
        for _ in range(20):
            x = csrc.new_empty(torch.zeros(1), LARGE // 2)
            x[::1000] = number
            if not (x[::1000] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_gradients_in_used_memory(empty, dtype, error):
    """What was in the memory before shows nowhere: ignored rows and the rows of a slice are 0."""
    x, targets, _ = pairs([(30, 40), (20, 60)], 20000, dtype=dtype)
    wide = torch.cat([x, x[:, :1]], 1).contiguous()
    for logits in (x, wide[:, :-1]):
        for op in (lambda y: dpo_loss(y, targets).loss, lambda y: token_logps(y, targets).sum()):
            csrc.new_empty(logits, 2 * logits.numel()).fill_(torch.nan)
            leaf = logits.detach().requires_grad_()
            (found,) = torch.autograd.grad(op(leaf), leaf)
            (exact,) = torch.autograd.grad(op(plain := logits.double().requires_grad_()), plain)
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=error)
            assert (found[targets == -100] == 0).all()
