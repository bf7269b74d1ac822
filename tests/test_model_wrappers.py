"""Models inside wrappers (LoRA, modules that hold a model) and under autocast, against their own forward."""

import pytest
import torch

pytest.importorskip("transformers")

from model_families import build
from model_tools import agree, forest_paths, own_paths, paths_and_gradients, with_lora

from dpo_fast.forest.gate import base_model
from dpo_fast.forest.model import prepare_model, restore_model


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_lora(name, options, in_float64, monkeypatch):
    """Through the PeftModel: adapters on and off, and gradients of the adapters alone."""
    if name == "gemma2":
        options = {**options, "target_modules": ["q_proj", "down_proj"]}
    model = with_lora(build(name, tie_word_embeddings=False), **options)
    own = paths_and_gradients(model, own_paths(model))
    with model.disable_adapter(), torch.no_grad():
        base = own_paths(model)
    assert (own[0] - base).abs().max() > 0.1
    plan = prepare_model(model)
    assert plan.path == "shared"
    assert base_model(model)._dpo_fast["plan"] is plan
    for share in ("prefix", "none"):
        agree(paths_and_gradients(model, forest_paths(model, share)), own)
        with model.disable_adapter(), torch.no_grad():
            torch.testing.assert_close(forest_paths(model, share), base, rtol=1e-9, atol=1e-9)
    # Checkpointed segments need an input that requires a gradient.
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    agree(paths_and_gradients(model, forest_paths(model, "prefix")), own)


class _Wrapper(torch.nn.Module):
    """As DistributedDataParallel: the model under `module`, calls passed on."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrappers_are_looked_through():
    model = build("llama")
    wrapped = _Wrapper(_Wrapper(with_lora(model)))
    assert base_model(wrapped) is base_model(model)
    own = own_paths(wrapped).detach()
    prepare_model(wrapped)
    torch.testing.assert_close(forest_paths(wrapped, "prefix").detach(), own, rtol=1e-5, atol=1e-5)
    restore_model(wrapped)
    assert not hasattr(base_model(wrapped), "_dpo_fast")


def test_autocast_reaches_trunk_and_head():
    """float32 weights under bf16 autocast: as near to the truth as the own forward under autocast."""
    model = build("llama", torch.float32)
    with torch.no_grad():
        truth = own_paths(build("llama"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own = own_paths(model).double()
        prepare_model(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = forest_paths(model, "prefix")
    error, other = (ours - truth).abs().max(), (own - truth).abs().max()
    assert other > 1e-3
    assert error <= 2 * other
