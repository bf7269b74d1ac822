"""What the tests of the ops share: back ends that run here, batches, and the rule by which results are compared."""

import dataclasses
import os

import pytest
import torch

from dpo_fast import backends
from dpo_fast.backends import BACKENDS, eager, resolve
from dpo_fast.losses import LossOptions

HALF = [torch.bfloat16, torch.float16]
FLOORS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    # Triton's interpreter rounds to bfloat16 toward zero, a GPU to nearest: a stored number lacks up to 2**-7 of itself.
    FLOORS[torch.bfloat16] += 2**-7


def back_ends() -> list[str]:
    """The back ends that take CPU tensors: torch, csrc where it is built, and triton under TRITON_INTERPRET=1."""
    found = []
    for name in ("torch", "triton", "csrc"):
        try:
            resolve(name, "cpu")
        except ValueError:
            continue
        found.append(name)
    return found


# (prompt, completion) of the sequences of four pairs: ragged, one token, no prompt.
LENGTHS = [(2, 3), (0, 1), (1, 4), (3, 2), (2, 2), (0, 5), (1, 1), (3, 3)]
# The public ops, which tests call by these names.
OPS = ("token_logps", "sequence_logps", "dpo_loss", "linear_token_logps", "linear_dpo_loss")
ON_GPU = (
    [pytest.param(f"{name} on cuda", marks=pytest.mark.gpu) for name in BACKENDS] if torch.cuda.is_available() else []
)


def moved(op, device):
    """`op` on `device` for tensors of the CPU: they are moved there, and the results are moved back, with gradients."""

    def to(x, where):
        if isinstance(x, torch.Tensor):
            return x.to(where)
        if isinstance(x, tuple):
            return tuple(to(part, where) for part in x)
        if isinstance(x, dict):
            return {name: to(part, where) for name, part in x.items()}
        if dataclasses.is_dataclass(x):
            return dataclasses.replace(x, **{f.name: to(getattr(x, f.name), where) for f in dataclasses.fields(x)})
        return x

    def call(*args, **options):
        if options.get("inplace"):
            pytest.skip("a copy of the logits is overwritten, not they: bench.gpu compares it with float64")
        return to(op(*to(args, device), **to(options, device)), "cpu")

    return call


@pytest.fixture(params=[*back_ends(), *ON_GPU])
def backend(request, monkeypatch):
    """A back end's name; for one on a GPU, the test's ops move their tensors there and back."""
    name, _, device = request.param.partition(" on ")
    if device:
        for op in OPS:
            if hasattr(request.module, op):
                monkeypatch.setattr(request.module, op, moved(getattr(request.module, op), device))
    return name


@pytest.fixture
def table():
    """The table of back ends, to which a test may add some; loaded back ends are forgotten before and after."""
    before = dict(backends.BACKENDS)
    backends._load.cache_clear()
    yield backends.BACKENDS
    backends._load.cache_clear()
    for name in backends.BACKENDS.keys() - before.keys():
        del backends.BACKENDS[name]


@pytest.fixture
def recorded(table):
    """The launchers that a back end called "recorded" has run; its rows are the reference's."""
    seen, plain = set(), backends.resolve("torch", "cpu")

    def record(name):
        def launcher(*args, **options):
            seen.add(name)
            return getattr(plain, name)(*args, **options)

        return launcher

    names = [field.name for field in dataclasses.fields(plain) if field.name != "name"]
    found = dataclasses.replace(plain, name="recorded", **{name: record(name) for name in names})
    table["recorded"] = lambda device: found
    return seen


@pytest.fixture
def missing(table):
    """The error of a back end called "missing", which no device has."""

    def loader(device):
        raise backends._MissingError("it is not built: pip install again")

    table["missing"] = loader
    return "backend 'missing' cannot be used on cpu: it is not built: pip install again; backend='torch' always can"


@pytest.fixture
def poison():
    """Uninitialised memory is NaN, so that entries which an op forgets to write show."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def small_tiles(patch, size: int) -> None:
    """Have the output layer work on tiles of `size` bytes, of any number of rows."""
    for device in eager.TILE_BYTES:
        patch.setitem(eager.TILE_BYTES, device, size)
    patch.setattr(eager, "ROW_STEP", 1)


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_within_rule(ours: dict, plain: dict, exact: dict, floor: float) -> None:
    """At most twice plain torch's own error, relative to the largest entry, plus `floor`."""
    assert ours.keys() == plain.keys() == exact.keys()
    for name, x in ours.items():
        y, z = exact[name], plain[name]
        assert x.shape == y.shape, name
        if y.dtype == torch.bool:
            assert torch.equal(x, y), name
            continue
        assert torch.equal(x.isfinite(), y.isfinite()), name
        keep = y.isfinite()
        if not keep.any():
            continue
        size = y[keep].abs().max().clamp(min=1e-30)
        error, theirs = (((t.double() - y)[keep].abs().max() / size).item() for t in (x, z))
        assert error <= 2 * theirs + floor, (name, error, theirs)


def pairs(lengths, v, *, packed=False, dtype=torch.float64, width=None, seed=0, scale=2.0):
    """A batch of sequences with (prompt, completion) `lengths`, of random `width` (default V) wide rows.

    Returns rows ([S, T, width] or [N, width]), targets with -100 for prompts and padding, and cu_seqlens or None.
    """
    rng = torch.Generator().manual_seed(seed)
    totals = [prompt + completion for prompt, completion in lengths]
    size = max(totals)
    rows = scale * torch.randn(len(lengths), size, width or v, generator=rng, dtype=torch.float64)
    targets = torch.full((len(lengths), size), -100)
    for s, (prompt, completion) in enumerate(lengths):
        targets[s, prompt : prompt + completion] = torch.randint(v, (completion,), generator=rng)
    rows = rows.to(dtype)
    if not packed:
        return rows, targets, None
    rows = torch.cat([rows[s, :n] for s, n in enumerate(totals)])
    targets = torch.cat([targets[s, :n] for s, n in enumerate(totals)])
    return rows, targets, torch.tensor([0, *totals]).cumsum(0).to(torch.int32)


def ref_for(loss_type, count, seed=5):
    if LossOptions(loss_type).reference_free:
        return None
    return -4 * torch.rand(count, generator=torch.Generator().manual_seed(seed))


def options_of(name):
    """A loss by name, with what it needs."""
    smoothed = {"exo_pair": 0.1, "robust": 0.2, "aot": 0.1, "simpo": 0.1}
    return {"loss_type": name, "label_smoothing": smoothed.get(name, 0.0)}


def fields(out, loss_grad=1.0, **leaves) -> dict:
    """The fields of a PreferenceOutput, or of the truth's dict, and the gradients of `loss_grad * loss`, by name."""
    found = out if isinstance(out, dict) else {name: getattr(out, name) for name in out.__dataclass_fields__}
    loss, found = found["loss"], {name: x.detach() for name, x in found.items()}
    if leaves:
        grads = torch.autograd.grad(loss * loss_grad, list(leaves.values()))
        found |= {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return found
