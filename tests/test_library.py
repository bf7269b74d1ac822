"""The ops as torch.library ops: opcheck, torch.compile(fullgraph=True), and the table of back ends."""

import importlib.util
import shutil
import types

import pytest
import torch
from op_tools import fields

import dpo_fast
from dpo_fast import backends, linear_dpo_loss, linear_token_logps, sequence_logps, token_logps
from dpo_fast.backends import BACKENDS, available_backends, resolve
from dpo_fast.backends.eager import OUTPUTS
from dpo_fast.ops import head as head_ops
from dpo_fast.ops import logits as logits_ops
from dpo_fast.ops import torch_library as library

S, T, V, D = 4, 3, 11, 5
NUMBERS = [0.1, 0.0, 0.5, 0.05, 0.5, 0.3]


def tensors(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (S, T), generator=rng)
    targets[0, 0] = targets[2] = -100
    return {
        "logits": torch.randn(S, T, V, generator=rng, dtype=dtype),
        "hidden": torch.randn(S, T, D, generator=rng, dtype=dtype),
        "weight": torch.randn(V, D, generator=rng, dtype=dtype),
        "bias": torch.randn(V, generator=rng, dtype=dtype),
        "targets": targets,
        "ref": -torch.rand(S, generator=rng),
        "cu": torch.arange(S + 1, dtype=torch.int32) * T,
    }


# ---- opcheck ----


def op_cases():
    x = tensors()
    logits, hidden, weight, bias, targets, ref, cu = x.values()
    flat, flat_targets, flat_hidden = logits.view(-1, V), targets.view(-1), hidden.view(-1, D)
    safe = flat_targets.clamp(min=0)
    lse, grad = torch.randn(S, T), torch.randn(S, T)
    shifted = torch.randn(S, T + 1, V)[:, :-1]

    def loss(names, weights=(1.0,)):
        numbers = library.pack_numbers(0.5, 3.0, 0.9, 0.5, *NUMBERS, *weights)
        return numbers, names, "reverse_kl,pairs", -100, "", False

    transform, plain = library.pack_numbers(0.5, 3.0, 0.9), library.pack_numbers(1.0, None, 1.0)
    head = (hidden.view(-1, D), weight, flat_targets, bias, cu, ref, None, torch.rand(2), None)
    residual, dh = torch.randn(4, V), torch.randn(0, D)

    def leaf(t):
        return t.detach().clone().requires_grad_()

    return {
        "token_logps": (
            logits_ops.token_logps,
            (leaf(logits), targets, transform, -100, ",".join(OUTPUTS), "", False),
        ),
        "token_logps packed": (logits_ops.token_logps, (leaf(flat), flat_targets, plain, -100, "", "", True)),
        "token_logps shifted": (logits_ops.token_logps, (shifted, targets, plain, -100, "", "", False)),
        "token_logps_backward": (logits_ops.token_logps_backward, (shifted, targets, lse, grad, transform, -100, "")),
        "dpo_loss": (logits_ops.dpo_loss, (logits, targets, None, ref, None, None, None, *loss("sigmoid"))),
        "dpo_loss shifted": (logits_ops.dpo_loss, (shifted, targets, None, ref, None, None, None, *loss("sigmoid"))),
        "dpo_loss packed": (
            logits_ops.dpo_loss,
            (flat, flat_targets, cu, None, torch.rand(2), None, None, *loss("hinge")),
        ),
        "dpo_loss mixed": (
            logits_ops.dpo_loss,
            (logits, targets, None, ref, None, None, None, *loss("aot,sft", (1.0, 2.0))),
        ),
        "dpo_loss_": (logits_ops.dpo_loss_, (logits.clone(), targets, None, ref, None, None, None, *loss("ipo"))),
        "sequence_sums": (logits_ops.sequence_sums, (leaf(grad.view(-1)), cu, False)),
        "scale_": (library.scale_, (flat.clone(), torch.tensor(2.0), [torch.zeros(2)], "")),
        "with_gradients": (
            library.with_gradients,
            (torch.tensor(1.0), torch.ones(2), torch.ones(4), [leaf(flat), leaf(bias)], [flat, bias], ""),
        ),
        "linear_token_logps": (
            head_ops.linear_token_logps,
            (
                leaf(flat_hidden),
                leaf(weight),
                safe,
                leaf(bias),
                transform,
                None,
                "entropy",
                "residual",
                4 * V * 4,
                "",
                False,
            ),
        ),
        "linear_token_logps frozen": (
            head_ops.linear_token_logps,
            (leaf(flat_hidden), weight, safe, None, transform, -100, "", "dh", 0, "", False),
        ),
        "linear_token_logps_backward": (
            head_ops.linear_token_logps_backward,
            (flat_hidden, weight, safe, bias, grad.view(-1), residual, dh, transform, -100, [True, True, True], ""),
        ),
        "linear_dpo_loss": (
            head_ops.linear_dpo_loss,
            (*head, *loss("sigmoid")[:-2], "entropy", [True, True, True], 7 * V * 4, "", False),
        ),
        "linear_dpo_loss frozen": (
            head_ops.linear_dpo_loss,
            (*head, *loss("sigmoid")[:-2], "", [True, False, False], 0, "", False),
        ),
    }


@pytest.mark.parametrize("name", op_cases())
def test_opcheck(name):
    op, arguments = op_cases()[name]
    checked = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"}
    if name == "with_gradients":
        # It differentiates every output, which is this op's error; the losses below are compiled whole.
        checked.remove("test_aot_dispatch_static")
    torch.library.opcheck(op, arguments, test_utils=sorted(checked))


def test_every_op_is_checked():
    here = {
        x._qualname.split("::")[1]
        for module in (library, logits_ops, head_ops)
        for x in vars(module).values()
        if isinstance(x, torch._library.custom_ops.CustomOpDef)
    }
    assert here == {name.split()[0] for name in op_cases()}


# ---- torch.compile ----


def run_token_logps(x):
    logps, stats = token_logps(x["logits"], x["targets"], outputs=OUTPUTS, temperature=0.9, softcap=5.0)
    return {"loss": logps.square().sum(), **stats}


def run_sequence_logps(x):
    logits, targets = x["logits"].view(-1, V), x["targets"].view(-1)
    return {"loss": sequence_logps(logits, targets, cu_seqlens=x["cu"], average=True).square().sum()}


def run_dpo_loss(x, **options):
    return fields_of(dpo_fast.dpo_loss(x["logits"] * 1.0, x["targets"], x["ref"], **options))


def run_shifted(x):
    return fields_of(dpo_fast.dpo_loss(x["logits"][:, :-1], x["targets"][:, 1:], x["ref"]))


def run_linear_token_logps(x, **options):
    hidden, targets = x["hidden"].view(-1, D), x["targets"].view(-1).clamp(min=0)
    logps = linear_token_logps(hidden, x["weight"], targets, bias=x["bias"], logit_scale=0.5, **options)
    return {"loss": logps.square().sum()}


def run_linear_dpo_loss(x, **options):
    out = linear_dpo_loss(x["hidden"], x["weight"], x["targets"], x["ref"], bias=x["bias"], **options)
    return fields_of(out)


def fields_of(out):
    return {name: getattr(out, name) for name in ("loss", "losses", "chosen_logps", "rejected_rewards")}


RUNS = {
    "token_logps": (run_token_logps, {}, ("logits",)),
    "sequence_logps": (run_sequence_logps, {}, ("logits",)),
    "dpo_loss": (run_dpo_loss, {}, ("logits",)),
    "dpo_loss inplace": (run_dpo_loss, {"inplace": True}, ("logits",)),
    "dpo_loss aot inplace": (run_dpo_loss, {"inplace": True, "loss_type": "aot"}, ("logits",)),
    "dpo_loss mixed": (run_dpo_loss, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, ("logits",)),
    "dpo_loss shifted": (run_shifted, {}, ("logits",)),
    "dpo_loss without gradient": (run_dpo_loss, {}, ()),
    "linear_token_logps": (run_linear_token_logps, {"workspace_bytes": 4 * V * 4}, ("hidden", "weight", "bias")),
    "linear_token_logps frozen": (run_linear_token_logps, {}, ("hidden",)),
    "linear_dpo_loss": (run_linear_dpo_loss, {"workspace_bytes": 7 * V * 4}, ("hidden", "weight", "bias")),
    "linear_dpo_loss frozen": (run_linear_dpo_loss, {}, ("hidden",)),
    "linear_dpo_loss aot": (run_linear_dpo_loss, {"loss_type": "aot"}, ("hidden", "weight")),
}


def results(function, needs, options):
    x = tensors()
    for name in needs:
        x[name].requires_grad_()
    out = function(x, **options)
    if needs:
        (3.0 * out["loss"]).backward()
    return {k: v.detach() for k, v in out.items()} | {f"d{k}": x[k].grad for k in needs}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", RUNS)
def test_compile_fullgraph(name, compiler):
    function, options, needs = RUNS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    expected = results(function, needs, options)
    ours = results(compiled, needs, options)
    for key, x in expected.items():
        torch.testing.assert_close(ours[key], x, rtol=1e-6, atol=1e-7, msg=key)


def test_compile_under_autocast():
    def function(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run_linear_token_logps(x)

    expected = results(function, ("hidden", "weight"), {})
    ours = results(torch.compile(function, backend="aot_eager", fullgraph=True), ("hidden", "weight"), {})
    assert all(torch.equal(ours[k], expected[k]) for k in expected)


def test_a_compiled_op_still_refuses_values():
    torch._dynamo.reset()
    x = tensors()
    x["targets"][1, 1] = V
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 11\)"):
        torch.compile(run_dpo_loss, backend="eager", fullgraph=True)(x)


def test_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(dpo_fast.dpo_loss, backend="aot_eager", fullgraph=True)
    for s, t in ((4, 3), (6, 5), (2, 9)):
        logits, targets = torch.randn(s, t, V).requires_grad_(), torch.randint(V, (s, t))
        one = fields(compiled(logits, targets), 2.0, logits=logits)
        two = fields(dpo_fast.dpo_loss(logits, targets), 2.0, logits=logits)
        assert all(torch.equal(one[k], two[k]) for k in one)


# ---- Back ends ----


def test_resolve():
    assert resolve("torch", torch.device("cpu")).name == "torch"
    assert resolve("", "cpu", torch.float64).name == "torch"
    assert list(BACKENDS) == ["csrc", "triton", "torch"]


def test_resolve_says_what_to_do():
    with pytest.raises(ValueError, match="backend is 'cuda': give one of csrc, triton, torch, or None"):
        resolve("cuda", "cpu")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot be used on cpu: .*; backend='torch' always can"):
        resolve("triton", "cpu")


def test_triton_on_a_cpu_only_in_the_interpreter(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    backends._load.cache_clear()
    with pytest.raises(ValueError, match=r"needs? CUDA tensors.*TRITON_INTERPRET=1"):
        token_logps(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), backend="triton")
    backends._load.cache_clear()


def test_the_fastest_that_is_there(monkeypatch):
    def there(name):
        return lambda device: backends.Backend(name, *[None] * len(backends.LAUNCHERS))

    def missing(device):
        raise backends._MissingError("no")

    backends._load.cache_clear()
    for table, cuda, cpu in (
        ({"csrc": there("csrc"), "triton": there("triton"), "torch": there("torch")}, "csrc", "csrc"),
        ({"csrc": missing, "triton": there("triton"), "torch": there("torch")}, "triton", "torch"),
        ({"csrc": missing, "triton": missing, "torch": there("torch")}, "torch", "torch"),
    ):
        monkeypatch.setattr(backends, "BACKENDS", table)
        backends._load.cache_clear()
        assert (resolve(None, "cuda").name, resolve(None, "cpu").name) == (cuda, cpu)
        assert resolve(None, "cuda", torch.float64).name == "torch"
    backends._load.cache_clear()


def test_available_backends():
    found = available_backends()
    assert list(found) == ["torch", "triton", "csrc"]
    assert found["torch"] is None


@pytest.mark.parametrize(
    ("error", "compilers", "message"),
    [
        (ModuleNotFoundError("no", name="dpo_fast._csrc"), "/bin/c++", "it was not built: run `pip install"),
        (ModuleNotFoundError("no", name="dpo_fast._csrc"), None, "there is no C\\+\\+ compiler here .apt install g"),
        (ImportError("undefined symbol: _ZN2at5emptyE"), "/bin/c++", "another torch .undefined symbol.*: run `pip"),
    ],
)
def test_an_extension_that_is_not_there_says_why(monkeypatch, error, compilers, message):
    def missing(name):
        raise error

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    monkeypatch.setattr(backends.shutil, "which", lambda name: compilers)
    with pytest.raises(backends._MissingError, match=message):
        backends._csrc("cpu")


def test_an_extension_of_another_torch_is_not_used(monkeypatch):
    old = types.SimpleNamespace(TORCH_VERSION="2.0.1", WITH_CUDA=False)
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: old)
    with pytest.raises(backends._MissingError, match=r"built for torch 2\.0\.1"):
        backends._csrc("cpu")


@pytest.mark.parametrize(("version", "fits"), [("2.13.0", True), ("2.13.0.dev20261101+cpu", True), ("2.13.01", False)])
def test_the_extension_s_torch_may_be_a_nightly(monkeypatch, version, fits):
    built = types.SimpleNamespace(TORCH_VERSION="2.13.0", WITH_CUDA=False, **dict.fromkeys(backends.LAUNCHERS))
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: built)
    monkeypatch.setattr(torch, "__version__", version)
    if fits:
        assert backends._csrc("cpu").name == "csrc"
    else:
        with pytest.raises(backends._MissingError, match="built for torch"):
            backends._csrc("cpu")


def test_float64_by_name_is_refused():
    assert resolve("torch", "cpu", torch.float64).name == "torch"
    if available_backends()["csrc"] is not None:
        pytest.skip("the extension is not built")
    with pytest.raises(ValueError, match="'csrc' takes no float64: give backend='torch' or None"):
        resolve("csrc", "cpu", torch.float64)


def test_the_extension_is_built():
    """Where the tests run there is a compiler: a build that fails in silence would leave its half of the tests out."""
    if importlib.util.find_spec("dpo_fast._csrc") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler: the extension cannot be built")
    assert resolve(None, "cpu").name == "csrc"
    assert resolve(None, "cpu", torch.float64).name == "torch"
