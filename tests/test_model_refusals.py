"""Models that dpo_fast cannot train or cannot share are found by running them: they are refused or padded."""

import pytest
import torch

pytest.importorskip("transformers")

from model_families import COMMON, VOCAB, build
from model_tools import forest_paths, own_paths
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, T5Config, T5ForConditionalGeneration

from dpo_fast.forest import attention
from dpo_fast.forest.model import prepare_model


class Tripled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out


class Masked(LlamaForCausalLM):
    """As chameleon: some words can never be said."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., 40:] = torch.finfo(out.logits.dtype).min
        return out


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Tripled, torch.float64), (Masked, torch.float64), (Tripled, torch.bfloat16)]
)
def test_an_unknown_head_is_refused(kind, dtype):
    model = kind(LlamaConfig(**COMMON))
    model.load_state_dict(build("llama", attention_bias=False).state_dict())
    model.to(dtype)
    before = dict(vars(model))
    with pytest.raises(ValueError, match=f"{kind.__name__} computes its logits in a way that dpo_fast does not know"):
        prepare_model(model)
    assert vars(model) == before
    assert model.config._attn_implementation != attention.NAME


def test_other_refusals():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="t5 is an encoder-decoder model"):
        prepare_model(t5)
    with pytest.raises(ValueError, match="no output embeddings"):
        prepare_model(LlamaModel(LlamaConfig(**COMMON)))
    assert not hasattr(t5, "_dpo_fast")


def test_a_model_whose_attention_cannot_be_reached_is_padded(monkeypatch):
    """Sharing that gives other numbers is found by running it, whatever the config says."""

    def blind(query, key, value, forest, scale, *_):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )

    monkeypatch.setattr(attention, "block_attention", blind)
    model = build("llama")
    own = own_paths(model).detach()
    plan = prepare_model(model)
    assert plan.path == "padded"
    assert "log-probs differ by" in plan.obstacle
    assert model.config._attn_implementation != attention.NAME
    torch.testing.assert_close(forest_paths(model, "none"), own, rtol=1e-6, atol=1e-6)
