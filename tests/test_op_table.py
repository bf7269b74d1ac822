"""Every row of the table of ops (op_table.py): values, gradients, memory, bits, graphs, in every back end that runs here."""

import functools

import pytest
import torch
from op_options import Op
from op_samples import Row, Sample, sample, wide
from op_table import OPS
from op_tools import FLOORS, INTERPRETED, ON_GPU, assert_within_rule, back_ends, poison, small_tiles  # noqa: F401 - poison is autouse
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast.backends import eager
from dpo_fast.ops import head, logits, torch_library

pytestmark = pytest.mark.usefixtures("poison")


def cases(graph: bool):
    """(op, row, dtype, back end) of the table; the kernels of the other back ends take no float64."""
    found = []
    for name, op in OPS.items():
        for row_name, row in op.rows.items():
            for dtype in row.dtypes if row.graph >= graph else ():
                for backend in [*back_ends(), *ON_GPU] if op.back_ends else ["torch"]:
                    backend, marks = getattr(backend, "values", [backend])[0], getattr(backend, "marks", ())
                    exact = dtype == torch.float64 and backend.split()[0] != "torch"
                    if exact or (backend == "triton" and not row.kernel):
                        continue
                    label = f"{name}: {row_name}-{str(dtype).split('.')[1]}-{backend}"
                    found.append(pytest.param(name, row_name, dtype, backend, id=label, marks=marks))
    return found


# ---- Running a sample ----


def outcome(out) -> tuple[torch.Tensor, dict]:
    """What carries the gradient, and all that came back by name."""
    out, stats = out if isinstance(out, tuple) else (out, {})
    if isinstance(out, torch.Tensor):
        return out, {"logps": out, **stats}
    found = out if isinstance(out, dict) else {name: getattr(out, name) for name in out.__dataclass_fields__}
    return found["loss"], {**found, **stats}


def run(function, x: Sample, needs, **own) -> dict:
    """Results and gradients by name, on the CPU."""
    leaves = {k: t.detach().requires_grad_(k in needs) for k, t in x.leaves.items()}
    wanted = {k: t for k, t in leaves.items() if k in needs}
    main, found = outcome(function(**leaves, **x.rest, **own))
    if wanted:
        assert main.requires_grad
        grad = torch.full_like(main, x.grad) if isinstance(x.grad, float) else x.grad.to(main.dtype)
        grads = torch.autograd.grad(main, list(wanted.values()), grad, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted.values(), strict=True)]
        found |= {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}
    else:
        assert not main.requires_grad
    return {k: t.detach().cpu() for k, t in found.items()}


def changed(x: Sample, change) -> Sample:
    """The sample with `change` made to each of its tensors."""

    def to(t):
        return change(t) if isinstance(t, torch.Tensor) else t

    return Sample({k: to(t) for k, t in x.leaves.items()}, {k: to(t) for k, t in x.rest.items()}, to(x.grad))


def moved(device: str):
    """A tensor's memory on a device, the tensor in it as it lay here."""

    def move(t):
        memory = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
        return memory.to(device).as_strided(t.shape, t.stride(), t.storage_offset())

    return move


def doubled(t):
    return t.double() if t.is_floating_point() else t


def needed(row: Row, x: Sample) -> tuple[str, ...]:
    return tuple(k for k in x.leaves if row.needs is None or k in row.needs)


@functools.cache
def truths(name: str, row_name: str, dtype: torch.dtype) -> tuple[dict, dict]:
    """Of plain torch in this type, and in float64."""
    op, row = OPS[name], OPS[name].rows[row_name]
    x = sample(op, row, dtype, False)
    plain, exact = (run(op.truth, part, needed(row, x)) for part in (x, changed(x, doubled)))
    if "is_top1" in exact:
        # The most likely word can be another one in half precision.
        exact["is_top1"] = plain["is_top1"]
    return plain, exact


def options_of(op: Op, row: Row, dtype: torch.dtype, backend: str, patch) -> dict:
    """What the op takes and the truth does not; tiles are set."""
    found = dict(row.own)
    if op.back_ends:
        found["backend"] = backend.partition(" ")[0]
    if row.kept is not None:
        found["workspace_bytes"] = row.kept * row.v * dtype.itemsize + 3
    if row.tile or row.tile_bytes:
        rows = (row.tile or 1) * row.v * wide(dtype).itemsize
        small_tiles(patch, row.tile_bytes or rows)
        patch.setattr(eager, "ROW_BYTES", rows)
    return found


def placed(op: Op, row: Row, dtype: torch.dtype, backend: str) -> Sample:
    x = sample(op, row, dtype, True)
    return changed(x, moved("cuda")) if backend.endswith("cuda") else x


# ---- Values, gradients, memory, bits ----


@pytest.mark.parametrize(("name", "row_name", "dtype", "backend"), cases(False))
def test_op(name, row_name, dtype, backend, monkeypatch):
    """By the rule of op_tools.py, with NaN wherever nothing must be read; the same bits twice; without a gradient too."""
    op, row = OPS[name], OPS[name].rows[row_name]
    own = options_of(op, row, dtype, backend, monkeypatch)
    x = placed(op, row, dtype, backend)
    needs = needed(row, x)
    ours = run(op.function, x, needs, **own)
    plain, exact = truths(name, row_name, dtype)
    assert_within_rule(ours, plain, exact, FLOORS[dtype] if row.floor is None else row.floor)
    for key, found in ours.items():
        kind = torch.bool if key == "is_top1" else dtype if key[1:] in x.leaves else wide(dtype)
        assert found.dtype == kind, key
    # Triton's interpreter runs the programs of a kernel in one order: a second time says nothing.
    again = ours if INTERPRETED else run(op.function, placed(op, row, dtype, backend), needs, **own)
    for key, found in ours.items():
        torch.testing.assert_close(again[key], found, rtol=0, atol=0, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}")
    if needs:
        with torch.no_grad():
            bare = run(op.function, placed(op, row, dtype, backend), (), **own)
        assert_within_rule(bare, *({k: t[k] for k in bare} for t in (plain, exact)), FLOORS[dtype])


# ---- Opcheck and torch.compile ----

GRAPHS = [(name, row_name) for name, op in OPS.items() for row_name, row in op.rows.items() if row.graph]
LIBRARY = {
    x._qualname.split("::")[1]
    for module in (torch_library, logits, head)
    for x in vars(module).values()
    if isinstance(x, torch._library.custom_ops.CustomOpDef)
}
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


class Recorder(TorchDispatchMode):
    """Calls of the library ops, one of each: the op and copies of its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dpo_fast" and func._opname not in self.calls:
            leaf = not func._opname.endswith("_backward")  # what autograd saved still says that it needs a gradient
            self.calls[func._opname] = (func, tuple(copied(x, leaf) for x in args))
        return func(*args, **(kwargs or {}))


def copied(x, leaf: bool):
    """A copy of a tensor with its strides, as a leaf where the tensor was one of a graph."""
    if isinstance(x, (list, tuple)):
        return [copied(part, leaf) for part in x]
    if not isinstance(x, torch.Tensor):
        return x
    memory = x.detach().as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).clone()
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_(leaf and x.requires_grad)


def library_calls(name: str, row_name: str) -> dict:
    op, row = OPS[name], OPS[name].rows[row_name]
    x = sample(op, row, row.dtypes[-1], False)
    with Recorder() as recorder, pytest.MonkeyPatch.context() as patch:
        run(op.function, x, needed(row, x), **options_of(op, row, row.dtypes[-1], "torch", patch))
    return recorder.calls


def test_every_library_op_is_called_by_a_row():
    assert set().union(*(library_calls(*graph) for graph in GRAPHS)) == LIBRARY


@pytest.mark.parametrize(("name", "row_name"), GRAPHS, ids=[": ".join(graph) for graph in GRAPHS])
def test_opcheck(name, row_name):
    """Of every library op that the row calls, forward and backward."""
    for op_name, (op, arguments) in library_calls(name, row_name).items():
        # with_gradients: opcheck differentiates every output, which is this op's error; test_graph compiles it whole.
        torch.library.opcheck(op, arguments, test_utils=UTILS[: 3 if op_name == "with_gradients" else 4])


@pytest.mark.parametrize(("name", "row_name"), GRAPHS, ids=[": ".join(graph) for graph in GRAPHS])
def test_graph(name, row_name, monkeypatch):
    """torch.compile(fullgraph=True), with backward: what comes out is that of the op as it is."""
    op, row = OPS[name], OPS[name].rows[row_name]
    own = options_of(op, row, row.dtypes[-1], "", monkeypatch)

    def function(**given):
        if row.own.get("inplace"):
            given = given | {"logits": given["logits"] * 1.0}  # a leaf cannot be overwritten inside of a graph
        return op.function(**given, **own)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = sample(op, row, row.dtypes[-1], False)
    ours, eager_ = (run(f, x, needed(row, x)) for f in (compiled, function))
    for key, found in eager_.items():
        torch.testing.assert_close(ours[key], found, rtol=1e-6, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


# ---- Backward ----

ONE_ROW = [(name, next(r for r, row in op.rows.items() if row.needs is None)) for name, op in OPS.items()]


@pytest.mark.parametrize(("name", "row_name"), ONE_ROW, ids=OPS)
def test_backward_twice(name, row_name):
    """The same bits where the graph was kept, or an error: a loss multiplies its gradient where it lies."""
    op, row = OPS[name], OPS[name].rows[row_name]
    x = sample(op, row, torch.float32, False)
    leaves = {k: t.requires_grad_() for k, t in x.leaves.items()}
    main, _ = outcome(op.function(**leaves, **x.rest))
    grad = torch.full_like(main, 2.0) if isinstance(x.grad, float) else x.grad.float()
    first = [g.clone() for g in torch.autograd.grad(main, list(leaves.values()), grad, retain_graph=True)]
    if not op.twice:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(main, list(leaves.values()), grad)
        return
    for a, b in zip(first, torch.autograd.grad(main, list(leaves.values()), grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("name", "row_name"), ONE_ROW, ids=OPS)
def test_a_second_derivative_is_refused(name, row_name, frozen):
    """Also where another term has one: what of it comes from the op would be missing in silence."""
    op, row = OPS[name], OPS[name].rows[row_name]
    x = sample(op, row, torch.float32, False)
    key = next(iter(x.leaves))
    leaves = {k: t.requires_grad_(k == key or not frozen) for k, t in x.leaves.items()}
    main, _ = outcome(op.function(**leaves, **x.rest))
    (g,) = torch.autograd.grad(main.square().sum() + leaves[key].pow(3).sum(), leaves[key], create_graph=True)
    if name == "preference_loss":  # plain PyTorch
        torch.autograd.grad(g.square().sum(), leaves[key])
        return
    with pytest.raises(RuntimeError, match="first derivatives only"):
        g.square().sum().backward()
