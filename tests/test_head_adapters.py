"""Adapters on the head, in float64: log-probs and gradients equal PEFT's own forward; those that are no weight are refused."""

import pytest
import torch

pytest.importorskip("transformers")

from model_families import build
from model_tools import agree, forest_paths, own_paths, paths_and_gradients, with_lora
from peft import IA3Config, LoraConfig, get_peft_model

from dpo_fast.forest.model import prepare_model

HEADS = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "rank-stabilised": {"target_modules": ["lm_head"], "use_rslora": True},
    "copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", HEADS)
def test_log_probs_and_gradients(options, tied, in_float64):
    model = with_lora(build("llama", tie_word_embeddings=tied), **HEADS[options])
    own = paths_and_gradients(model, own_paths(model))
    with model.disable_adapter(), torch.no_grad():
        base = own_paths(model)
    assert (own[0] - base).abs().max() > 0.1
    assert any("lm_head" in name and g.abs().max() > 0 for name, g in own[1].items())
    assert prepare_model(model).path == "shared"
    for share in ("prefix", "none"):
        agree(paths_and_gradients(model, forest_paths(model, share)), own)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(forest_paths(model, "prefix"), base, rtol=1e-9, atol=1e-9)


def test_a_head_with_a_bias(in_float64):
    model = with_lora(build("phi"), target_modules=["q_proj", "lm_head"])
    own = paths_and_gradients(model, own_paths(model))
    prepare_model(model)
    agree(paths_and_gradients(model, forest_paths(model, "prefix")), own)


def test_merged_adapters_and_several(in_float64):
    model = with_lora(build("llama"), target_modules=["lm_head"])
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
    model.double()
    torch.nn.init.normal_(model.base_model.model.lm_head.lora_B["second"].weight, std=0.3)
    prepare_model(model)
    for name in ("default", "second"):
        model.set_adapter(name)
        torch.testing.assert_close(forest_paths(model, "prefix"), own_paths(model), rtol=1e-9, atol=1e-9)
    before = forest_paths(model, "prefix")
    model.merge_adapter()
    torch.testing.assert_close(forest_paths(model, "prefix"), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(r=2, target_modules=["lm_head"], use_dora=True), "Dora"),
        (IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "Linear"),
    ],
)
def test_what_is_no_weight_is_refused(config, named):
    """They start as identities: the probe cannot see that they would be left out."""
    wrapped = get_peft_model(build("llama"), config)
    with pytest.raises(ValueError, match=f"adapters of this kind on the head .*{named}"):
        prepare_model(wrapped)
    model = build("llama")
    prepare_model(model)
    with pytest.raises(ValueError, match="adapters of this kind on the head"):
        forest_paths(get_peft_model(model, config), "prefix")


def test_dropout_on_the_head_is_refused_while_training():
    model = with_lora(build("llama"), target_modules=["lm_head"], lora_dropout=0.2)
    prepare_model(model)
    forest_paths(model, "prefix")
    model.train()
    with pytest.raises(ValueError, match=r"lora_dropout 0\.2 on the head"):
        forest_paths(model, "prefix")
