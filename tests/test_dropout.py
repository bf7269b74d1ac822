"""`disable_dropout`: modules, module attributes and config fields, in families that hand a probability to `F.dropout`."""

import copy

import pytest
import tiny
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.forest.model import own_config, prepare_model
from dpo_fast.forest.packing import PrefixForest
from dpo_fast.training.dropout import no_dropout
from dpo_fast.training.start_checks import verify_training_mode

SMALL = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 4}
OPT = {**LLAMA, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
XGLM = {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": {**LLAMA, "attention_dropout": 0.3},
    "starcoder2": {**LLAMA, "num_key_value_heads": 2, "residual_dropout": 0.3, "embedding_dropout": 0.3},
    "opt": {**OPT, "dropout": 0.3, "attention_dropout": 0.3},
    "xglm": {**XGLM, "dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3},
    "biogpt": {**LLAMA, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "activation_dropout": 0.3},
    "falcon": {**LLAMA, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "bloom": {**BLOOM, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "gpt2": {**GPT, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "gpt_bigcode": {**GPT, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "persimmon": {**LLAMA, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "gpt_neox": {**LLAMA, "hidden_dropout": 0.3, "attention_dropout": 0.3},
}
PROMPTS, COMPLETIONS = [[5, 9, 3, 7, 11, 12, 33]] * 2, [[4, 8, 6], [11, 2, 10, 5]]
ROWS = [{"prompt_ids": PROMPTS[0], "chosen_ids": COMPLETIONS[0], "rejected_ids": COMPLETIONS[1]}]


def build(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL, **FAMILIES[name]))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model if name == "xglm" else model.double()  # xglm's mask of float32's lowest number does not fit float64


@pytest.mark.parametrize("name", FAMILIES)
def test_training_mode_computes_what_evaluation_does(name):
    model = build(name)
    noisy = copy.deepcopy(model).train()
    ids = torch.tensor([PROMPTS[0] + COMPLETIONS[0]])
    with torch.no_grad():
        assert (noisy(ids).logits - noisy(ids).logits).abs().max() > 1e-3  # the family does drop something
    own_config(model)
    no_dropout(model)
    plan = prepare_model(model)
    forest = PrefixForest.build(PROMPTS, COMPLETIONS, share="prompt" if plan.share else "none")
    with torch.no_grad():
        model.train()
        first, second = (model(forest=forest)["token_logps"] for _ in range(2))
        model.eval()
        still = model(forest=forest)["token_logps"]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, still, rtol=1e-12, atol=1e-5 if name == "xglm" else 1e-12)


@pytest.mark.parametrize("name", ["gpt_bigcode", "persimmon", "opt"])
def test_a_run_of_a_family_with_dropout_starts_at_its_reference(tmp_path, name, caplog):
    args = DPOConfig(
        output_dir=str(tmp_path / "run"), ref_cache_dir=str(tmp_path / "ref"), report_to="none", use_cpu=True, bf16=False,
        max_steps=1, logging_steps=1, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(build(name), args=args, train_dataset=ROWS)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - 0.693147) < 1e-5
    assert "differ before the first step" not in caplog.text


class _Noisy(torch.nn.Module):
    """A layer whose randomness has no option."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x * (1 + 0.1 * torch.randn_like(x)) if self.training else x)


def test_randomness_that_no_option_turns_off_is_found():
    model = tiny.llama()
    prepare_model(model)
    assert verify_training_mode(model, ROWS, "prompt") == 0
    model.model.layers[0].mlp = _Noisy(model.model.layers[0].mlp)
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="two passes in training mode differ"):
        verify_training_mode(model, ROWS, "prompt")
    assert verify_training_mode(model, ROWS, "prompt", deterministic=False) > 0
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_router_that_draws_experts_is_named_and_keeps_its_threshold(tmp_path):
    """phimoe: the jitter of its router is a threshold in evaluation too, where 0 would give other numbers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "phimoe", **SMALL, **LLAMA, num_key_value_heads=2, num_local_experts=4, input_jitter_noise=0.1
    )
    config.router_jitter_noise = 0.4
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([PROMPTS[0]])
    before = model(ids).logits
    args = DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"Phimoe\w+ draws its experts at random.*disable_dropout=False"):
        DPOTrainer(model, args=args, train_dataset=ROWS)
    own_config(model)
    no_dropout(model)
    assert torch.equal(model(ids).logits, before)
    assert model.config.router_jitter_noise == 0.4
    assert model.config.input_jitter_noise == 0.0


def test_another_model_made_from_the_same_config_keeps_its_own():
    first = tiny.llama(attention_dropout=0.25)
    second = type(first)(first.config).double()
    second.load_state_dict(first.state_dict())
    ids = torch.tensor([[5, 9, 3]])
    before = second.eval()(ids).logits
    own_config(first)
    no_dropout(first)
    prepare_model(first)
    assert second.config.attention_dropout == 0.25
    assert second.config._attn_implementation != first.config._attn_implementation
    assert torch.equal(second(ids).logits, before)
    second.model(ids)  # its trunk is still callable by itself
    prepare_model(second)
