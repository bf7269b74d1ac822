"""The fingerprint of a model's weights: it sees every bit and the config, and knows a model again after saving."""

import pytest
import torch
from torch import nn

from dpo_fast.training import ref_cache
from dpo_fast.training.ref_cache import weights_fingerprint


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4, dtype=torch.bfloat16)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(4)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_fingerprint_sees_every_bit_of_the_weights(monkeypatch):
    base = weights_fingerprint(Tiny())
    assert base == weights_fingerprint(Tiny())
    assert len(base) == 32

    def changed(change):
        model = Tiny()
        with torch.no_grad():
            change(model)
        return weights_fingerprint(model)

    def flip_one_bit(model):
        model.embed.weight.view(torch.int16)[3, 2] ^= 1

    def transpose(model):
        model.embed.weight.data = model.embed.weight.data.reshape(4, 7)

    assert changed(lambda m: m.scratch.fill_(1)) == base
    assert changed(lambda m: setattr(m.embed.weight, "data", m.embed.weight.data.t().contiguous().t())) == base
    differing = [
        changed(flip_one_bit),
        changed(transpose),
        changed(lambda m: m.scale.fill_(3)),
        changed(lambda m: m.norm.double()),
        changed(lambda m: m.norm.register_buffer("more", torch.zeros(()))),
        changed(lambda m: m.norm.load_state_dict({"weight": m.norm.bias, "bias": m.norm.weight})),
    ]
    assert len({base, *differing}) == 1 + len(differing)

    hashed = []
    digest = ref_cache._bytes_digest
    monkeypatch.setattr(ref_cache, "_bytes_digest", lambda t: hashed.append(tuple(t.shape)) or digest(t))
    weights_fingerprint(Tiny())
    assert sorted(hashed) == [(), (4,), (4,), (7, 4)], "the tied weight is hashed once"


def test_fingerprint_refuses_state_that_is_no_tensor():
    class Scaled(nn.LayerNorm):
        def get_extra_state(self):
            return {"amax": 1.0}

    model = Tiny()
    model.norm = Scaled(4)
    with pytest.raises(ValueError, match=r"norm\._extra_state: dict is no tensor"):
        weights_fingerprint(model)
    left_out = weights_fingerprint(model, skip=lambda name: "extra" in name)
    assert left_out == weights_fingerprint(model, skip=lambda name: "_extra_state" in name)
    # A module without a config is also known by what it prints of itself: another kind of layer is another model.
    assert left_out != weights_fingerprint(Tiny())
    with pytest.raises(NotImplementedError, match="meta"):
        weights_fingerprint(nn.Linear(2, 2, device="meta"))


def tiny_llama(**changes):
    transformers = pytest.importorskip("transformers")
    config = dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **changes}))


def test_fingerprint_of_a_model_survives_saving_but_not_a_config_change(tmp_path):
    model = tiny_llama()
    base = weights_fingerprint(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    loaded.config.use_cache = False
    assert weights_fingerprint(loaded) == base
    loaded.config.rms_norm_eps = 1e-5
    assert weights_fingerprint(loaded) != base
    assert weights_fingerprint(tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 1e6})) != base


def test_fingerprint_of_a_peft_model_without_its_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    skip = lambda name: "lora_" in name  # noqa: E731
    model = peft.get_peft_model(tiny_llama(), config)
    everything, base = weights_fingerprint(model), weights_fingerprint(model, skip=skip)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).add_(1)
    assert weights_fingerprint(model) != everything
    assert weights_fingerprint(model, skip=skip) == base
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "q_proj.base_layer" in name).add_(1)
    assert weights_fingerprint(model, skip=skip) != base
