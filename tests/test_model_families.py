"""Model families in float64: shared, padded and through their own forward, one sequence at a time."""

import re

import pytest
import torch

pytest.importorskip("transformers")

from model_families import COMMON, PADDED, SHARED, VOCAB, build
from model_tools import A, agree, force_padding, forest_paths, own_paths, paths_and_gradients
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_fast.forest import attention
from dpo_fast.forest.gate import plan_model
from dpo_fast.forest.model import prepare_model, restore_model
from dpo_fast.forest.packing import PrefixForest


@pytest.mark.parametrize("name", SHARED)
def test_shared_family(name, in_float64, monkeypatch):
    model = build(name)
    own = paths_and_gradients(model, own_paths(model))
    # Weights matter: the log-probs are not those of a uniform distribution, and differ from each other.
    assert own[0][own[0] != 0].std() > 0.3
    plan = prepare_model(model)
    assert (plan.path, plan.obstacle, plan.share) == ("shared", None, True)
    for share in ("prefix", "prompt", "none"):
        agree(paths_and_gradients(model, forest_paths(model, share)), own)
    # phimoe's router draws random numbers while training.
    if model.supports_gradient_checkpointing and name != "phimoe":
        model.train()
        model.gradient_checkpointing_enable()
        calls = count_calls(monkeypatch, attention, "block_attention")
        checkpointed = paths_and_gradients(model, forest_paths(model, "prefix"))
        assert calls[0] == 2 * model.config.num_hidden_layers
        agree(checkpointed, own)
        model.gradient_checkpointing_disable()
        model.eval()
    restore_model(model)
    force_padding(monkeypatch)
    plan = prepare_model(model)
    assert (plan.path, plan.obstacle, plan.share) == ("padded", "the test says so", False)
    agree(paths_and_gradients(model, forest_paths(model, "none")), own)


@pytest.mark.parametrize("padded", [False, True])
def test_the_truth_is_eager_attention(padded, in_float64, monkeypatch):
    """A model whose own implementation drops a soft-cap in silence is not padded with it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def capless(*args, softcap=None, **kwargs):
        return attention.plain_forward(*args, scaling=kwargs["scaling"], dropout=0.0)

    AttentionInterface.register("capless", capless)
    AttentionMaskInterface.register("capless", sdpa_mask)
    model = build("gemma2")
    own = paths_and_gradients(model, own_paths(model))
    model.set_attn_implementation("capless")
    assert (own_paths(model) - own[0]).abs().max() > 0.05
    if padded:
        force_padding(monkeypatch)
    plan = prepare_model(model)
    assert (plan.path, plan.attention) == (("padded", "eager") if padded else ("shared", None))
    agree(paths_and_gradients(model, forest_paths(model, "none")), own)
    restore_model(model)
    assert model.config._attn_implementation == "capless"


def count_calls(monkeypatch, module, name):
    calls, function = [0], getattr(module, name)

    def counted(*args, **kwargs):
        calls[0] += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("name", PADDED)
def test_padded_family(name, in_float64):
    model = build(name)
    own = paths_and_gradients(model, own_paths(model))
    plan = prepare_model(model)
    assert plan.path == "padded"
    assert not plan.share
    assert re.search(PADDED[name][1], plan.obstacle)
    agree(paths_and_gradients(model, forest_paths(model, "none")), own)
    with pytest.raises(ValueError, match="share='none'"):
        forest_paths(model, "prompt")


def test_layers_that_differ_only_far_out_are_refused_by_their_config():
    """Eight tokens of a probe cannot show these."""
    for options, text in (
        ({"attention_chunk_size": 8192}, "attends in chunks of 8192"),
        ({"mamba_d_state": 16}, "has a recurrent state"),
        ({"layer_types": ["indexed_attention", "full_attention"]}, "indexed_attention"),
        ({"is_causal": False}, "attends to later tokens"),
    ):
        model = build("llama")
        for key, value in options.items():
            setattr(model.config, key, value)
        plan = plan_model(model)
        assert plan.path == "padded"
        assert text in plan.obstacle


def test_bidirectional_attention_is_refused():
    """A token that sees itself has no log-prob: the own forward's numbers depend on what follows."""
    model = build("gemma3_text", use_bidirectional_attention=True)
    assert "attends to later tokens" in plan_model(model).obstacle
    with pytest.raises(ValueError, match="in a way that dpo_fast does not know"):
        prepare_model(model)


def test_statistics_are_those_of_the_models_logits():
    for name in ("gemma2", "cohere", "granite", "phi"):
        model = build(name)
        prompts, completions = [A, A], [[5, 6, 7], [5, 8]]
        logits = [
            model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1] for p, c in zip(prompts, completions, strict=True)
        ]
        prepare_model(model)
        forest = PrefixForest.build(prompts, completions)
        out = model(forest=forest, outputs=("entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
        for s, rows in enumerate(logits):
            path = forest.path_index[s, : len(rows)]
            q = rows.softmax(-1)
            torch.testing.assert_close(out["entropy"][path], -(q * q.log()).sum(-1), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(out["mean_logits"][path], rows.mean(-1), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(out["log_sum_sq_probs"][path], q.square().sum(-1).log(), rtol=1e-5, atol=1e-6)
            assert torch.equal(out["is_top1"][path], rows.argmax(-1) == torch.tensor(completions[s]))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_low_precision_is_as_exact_as_the_models_own(name, dtype, floor):
    """Error at most twice the own forward's, plus a floor; the truth is float64 with the rounded weights."""
    model = build(name, dtype)
    exact = build(name)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        truth, own = own_paths(exact), own_paths(model).double()
        assert prepare_model(model).path == "shared"
        ours = forest_paths(model, "prefix")
    assert ours.dtype == torch.float32
    spread = truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * (own - truth).abs().max() + floor * spread


def test_a_trained_head_past_its_workspace_is_the_same():
    results = []
    for workspace in (0, 5 * VOCAB * 8, 1 << 30):
        model = build("llama")
        prepare_model(model, workspace_bytes=workspace)
        results.append(paths_and_gradients(model, forest_paths(model, "prefix")))
    for result in results[:2]:
        agree(result, results[2], rtol=1e-6)


def test_small_vocabularies_and_models_without_weights():
    assert prepare_model(build("llama", vocab_size=3)).path == "shared"
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**COMMON))
    assert prepare_model(model).path == "shared"
