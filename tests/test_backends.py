"""The table of back ends: the fastest that is there, and what is said of one that is not."""

import importlib.util
import shutil
import types

import pytest
import torch

from dpo_fast import backends, token_logps
from dpo_fast.backends import BACKENDS, available_backends, resolve


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
