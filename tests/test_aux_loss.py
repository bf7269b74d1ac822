"""The load-balancing loss of mixtures of experts equals that of the model's own module, over every token once."""

import inspect

import pytest
import torch

pytest.importorskip("transformers")

from model_families import build
from model_tools import COMPLETIONS, PROMPTS, agree, force_padding, forest_paths, gradients
from peft import LoraConfig, get_peft_model

from dpo_fast.forest.gate import has_aux_loss
from dpo_fast.forest.model import prepare_model
from dpo_fast.forest.packing import PrefixForest


def own_aux_loss(model):
    """`load_balancing_loss_func` of the model's module over the tokens of all sequences, unshared and unpadded."""
    per_sequence = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        out = model.model(torch.tensor([prompt + completion]), use_cache=False, output_router_logits=True)
        per_sequence.append([x.reshape(-1, x.shape[-1]) for x in out.router_logits])
    layers = tuple(torch.cat(layer) for layer in zip(*per_sequence, strict=True))
    assert layers[0].shape[0] == sum(len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True))
    loss = inspect.getmodule(type(model)).load_balancing_loss_func
    return loss(layers, 4, model.config.num_experts_per_tok)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("path", ["shared", "padded"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_aux_loss(name, path, checkpointing, in_float64, monkeypatch):
    model = build(name)
    assert has_aux_loss(model)
    own = own_aux_loss(model)
    theirs = own.detach()[None], gradients(model, own)
    if path == "padded":
        force_padding(monkeypatch)
    assert prepare_model(model).path == path
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    for share in ("prefix", "prompt", "none") if path == "shared" else ("none",):
        forest = PrefixForest.build(PROMPTS, COMPLETIONS, share=share, keep_last=True)
        out = model(forest=forest, aux_loss=True)
        agree((out["aux_loss"].detach()[None], gradients(model, out["aux_loss"])), theirs)
    # The log-probs are those of a call without it, and the loss needs the rows that predict nothing.
    torch.testing.assert_close(out["token_logps"], model(forest=forest)["token_logps"], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="keep_last=True"):
        forest_paths(model, "none", aux_loss=True)


def test_only_routers_have_an_aux_loss():
    assert not has_aux_loss(build("llama"))
    assert not has_aux_loss(torch.nn.Linear(2, 2))
    assert has_aux_loss(get_peft_model(build("mixtral"), LoraConfig(target_modules=["q_proj"])))
