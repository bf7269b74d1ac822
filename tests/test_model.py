"""Model families in float64: shared, padded and through their own forward, one sequence at a time."""

import copy
import inspect
import re

import pytest
import torch

pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dpo_fast.forest import attention, gate
from dpo_fast.forest.gate import base_model, has_aux_loss, plan_model
from dpo_fast.forest.model import evaluating, prepare_model, restore_model
from dpo_fast.forest.packing import PrefixForest
from dpo_fast.losses import preference_loss
from dpo_fast.training import start_checks as verify

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"sliding_window": 5}
ONE_OF_EACH = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GEMMA = {**WINDOW, **ONE_OF_EACH, "query_pre_attn_scalar": 4}

SHARED = {
    "llama": {"attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": WINDOW,
    "gemma2": {**GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": GEMMA,
    "phi3": {},
    "gpt2": {**SPECIAL, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, **NO_DROPOUT},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": EXPERTS,
    "qwen2_moe": {**EXPERTS, **WINDOW, **ONE_OF_EACH, "use_sliding_window": True, "shared_expert_intermediate_size": 8},
    "jetmoe": {**EXPERTS, "num_local_experts": 4, "kv_channels": 4},
    "minicpm3": {**LATENT, "dim_model_base": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "deepseek_v3": {
        **LATENT,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 1.5, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "gpt_oss": {**WINDOW, **ONE_OF_EACH, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "phi": {},  # its head has a bias
    "phimoe": {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": {**WINDOW, "residual_dropout": 0.0, "embedding_dropout": 0.0},
}
# What a family is padded for, as its plan says it.
PADDED = {
    "llama4_text": ({"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 24}, "chunk"),
    "qwen3_next": (
        {
            **EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "shared_expert_intermediate_size": 8,
        },
        "attention interface",
    ),
    "mamba": ({**SPECIAL, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, "attention interface"),
    "bloom": ({**SPECIAL, "hidden_size": 16, "n_layer": 2, "n_head": 4}, "attention interface"),
    "stablelm": ({}, "attention interface"),
    "nemotron": ({}, "does not hand the forest on"),
    "recurrent_gemma": (
        {"num_hidden_layers": 3, "attention_window_size": 5, "logits_soft_cap": 3.0},
        "linear_attention|differ by",  # 5.17 names no kinds of layers
    ),
    "doge": ({"keep_window_size": 64}, "attention mask of its own"),
    "dynamic rope": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "scales its rotary positions with the row's length",
    ),
    "longrope": (
        {
            "original_max_position_embeddings": 32,  # phi3 takes this one before that of rope_parameters
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 4.0],
                "original_max_position_embeddings": 32,
            },
        },
        "scales its rotary positions with the row's length",
    ),
}
TYPES = {"dynamic rope": "llama", "longrope": "phi3"}
BARE = ("gpt2", "mamba", "bloom")
# Of these, other implementations than eager are no truth in transformers 5.17: its sdpa drops the soft-cap, doge's mask too.
EAGER = ("gemma2", "doge")


@pytest.fixture
def in_float64(monkeypatch):
    """Models round some steps to float32 (norms, gemma2's softmax, routers): let them mean float64.

    Else a difference of 1e-16 before the rounding is one of 1e-7 after it, and no tolerance below that can be asked for.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)


def build(name, dtype=torch.float64, seed=0, **changes):
    """A tiny model in eval mode; weights large enough that logits differ by several nats."""
    options = {**SHARED, **{k: v for k, (v, _) in PADDED.items()}}[name]
    options = {**({} if name in BARE else COMMON), **options, **changes}
    if "kv_lora_rank" in options:
        del options["head_dim"]
    config = AutoConfig.for_model(TYPES.get(name, name), **options)
    own = {"attn_implementation": "eager"} if name in EAGER else {}
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", **own)
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=rng)
        p.data = (noise * 0.3 if p.ndim > 1 else p.data + noise * 0.1).to(dtype)
    for b in model.buffers():
        b.data = b.data.to(dtype) if b.is_floating_point() else b.data
    return model.eval()


A, B = [5, 17, 33, 8, 40, 21, 7, 50, 12], [44, 3, 29]
LONG = [*range(20, 37)]
# Three pairs and two more, with a shared beginning of responses, a one-token completion, equal ones, and two prompts
# with a long common beginning.
PAIRS = [
    (A, [5, 6, 7, 8, 9, 10], [5, 6, 20, 21, 3]),
    (B, [11, 12], [30, 31, 4, 9]),
    (A, [5], [50, 51]),
    ([*LONG, 4], [9, 9, 8], [9, 9, 8]),
    ([*LONG, 6, 7], [5, 8], [10]),
]
PROMPTS = [p for p, _, _ in PAIRS] * 2
COMPLETIONS = [c for _, c, _ in PAIRS] + [r for _, _, r in PAIRS]


def coefficients():
    """A weight for every token of every sequence [S, C], so that no error of one token can hide in a sum."""
    longest = max(map(len, COMPLETIONS))
    return torch.randn(len(PROMPTS), longest, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def objective(paths):
    """A DPO loss on sequence sums, and a weighted sum of every token's log-prob; paths [S, C]."""
    chosen, rejected = paths.sum(1).view(2, -1)
    dpo = preference_loss(chosen, rejected, chosen.detach() + 1, rejected.detach(), beta=0.3).loss
    return dpo + (paths * coefficients()).sum()


def own_paths(model, prompts=PROMPTS, completions=COMPLETIONS):
    """Token log-probs [S, C] by the model's own forward, one sequence at a time."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion])
        logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        picked = logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        rows.append(torch.nn.functional.pad(picked, (0, max(map(len, completions)) - len(completion))))
    return torch.stack(rows)


def forest_paths(model, share, keep_last=False, **options):
    forest = PrefixForest.build(PROMPTS, COMPLETIONS, share=share, keep_last=keep_last)
    return forest.gather_paths(model(forest=forest, **options)["token_logps"])


def gradients(model, loss):
    """Gradients by name; zero where a parameter has no part (an expert that nobody chose)."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


def agree(ours, theirs, rtol=1e-9):
    """(paths, gradients) equal to `rtol` of each tensor's largest entry."""
    scale = max(g.abs().max() for g in theirs[1].values())
    assert (ours[0] - theirs[0]).abs().max() <= rtol * theirs[0].abs().max()
    assert ours[1].keys() == theirs[1].keys()
    for name, g in theirs[1].items():
        error = (ours[1][name] - g).abs().max()
        # A gradient that is zero by symmetry (a key's bias) is rounding noise of the others.
        assert error <= rtol * g.abs().max() + 1e-13 * scale, (name, error.item(), g.abs().max().item())


def paths_and_gradients(model, paths):
    return paths.detach(), gradients(model, objective(paths))


def force_padding(monkeypatch):
    monkeypatch.setattr(gate, "sharing_obstacle", lambda model: "the test says so")


# ---- Families ----


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


# ---- Ordinary calls ----


def ordinary_calls(model):
    """Logits of real tokens and generated tokens, for unpadded and padded batches."""
    ids = torch.tensor([A, [*B, 1, 6, 13, 9, 25, 31]])
    pad = torch.zeros(2, 3, dtype=torch.int64)
    left, right = torch.cat([pad, ids], 1), torch.cat([ids, pad], 1)
    masks = {"left": (left != 0).long(), "right": (right != 0).long()}
    # The second row is longer than the first: it fills what is padding in the first.
    left[1, :3], right[1, -3:] = 7, 7
    masks["left"][1], masks["right"][1] = 1, 1
    out = {}
    with torch.no_grad():
        out["bare"] = model(ids).logits
        out["tuple"] = model(input_ids=ids, return_dict=False, use_cache=False)[0]
        for side, batch in (("left", left), ("right", right)):
            positions = (masks[side].cumsum(1) - 1).clamp(min=0)
            logits = model(batch, attention_mask=masks[side], position_ids=positions).logits
            out[side] = logits[masks[side].bool()]
        options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        options |= {"eos_token_id": None, "pad_token_id": 0}
        for kind, extra in (("masked", {"attention_mask": masks["left"]}), ("inferred", {})):
            generated = model.generate(left, **options, **extra)
            out[f"{kind} tokens"] = generated.sequences
            out[f"{kind} logits"] = torch.stack(generated.logits)
    return out


@pytest.mark.parametrize("name", SHARED)
def test_ordinary_calls_are_as_before(name, in_float64):
    model = build(name)
    before = ordinary_calls(model)
    prepare_model(model)
    after = ordinary_calls(model)
    restore_model(model)
    again = ordinary_calls(model)
    for key, x in before.items():
        assert torch.equal(x, again[key]), key
        torch.testing.assert_close(after[key], x, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


def test_an_ordinary_loss_and_its_gradients_are_as_before():
    model, ids = build("llama"), torch.tensor([A])
    before = gradients(model, model(ids, labels=ids).loss)
    prepare_model(model)
    after = gradients(model, model(ids, labels=ids).loss)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_signature_of_forward_is_kept():
    model = build("llama")
    before = inspect.signature(model.forward)
    prepare_model(model)
    assert inspect.signature(model.forward) == before


def test_restore_undoes_everything():
    model = build("llama")
    before, implementation = dict(vars(model)), model.config._attn_implementation
    prepare_model(model)
    assert model.config._attn_implementation == attention.NAME
    restore_model(model)
    assert vars(model) == before
    assert model.config._attn_implementation == implementation
    with pytest.raises(ValueError, match="input_ids"):
        forest_paths(model, "prefix")
    restore_model(model)
    # A forward that something else had put on the model is put back.
    wrapped = model.forward
    model.forward = wrapped
    prepare_model(model)
    assert model.forward is not wrapped
    restore_model(model)
    assert vars(model)["forward"] is wrapped


def test_a_model_on_the_cpu_is_prepared_for_the_back_end_of_another_device(missing):
    """The trainer moves a model to its GPU after it was checked where it was loaded."""
    model = build("llama")
    plan = prepare_model(model, backend="missing")
    assert plan.path == "shared"
    verify.verify_sharing(model, plan, [EXAMPLE], "prefix")
    with pytest.raises(ValueError, match=re.escape(missing)):
        forest_paths(model, "prefix")


def test_preparing_twice_changes_nothing():
    model = build("llama")
    plan = prepare_model(model)
    forward, saved = model.forward, model._dpo_fast
    assert prepare_model(model) is plan
    assert model.forward == forward
    assert model._dpo_fast is saved
    forest_paths(model, "prefix")
    restore_model(model)
    assert prepare_model(model) == plan


def test_a_copy_of_a_prepared_model_is_a_model_of_its_own():
    model = build("llama")
    prepare_model(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
        assert (own_paths(model) - own_paths(other)).abs().max() > 0.01
        for one in (model, other):
            torch.testing.assert_close(forest_paths(one, "prefix"), own_paths(one), rtol=1e-9, atol=1e-9)


def test_the_trunk_alone_says_what_is_wrong():
    model = build("llama")
    prepare_model(model)
    with pytest.raises(RuntimeError, match="without its prefix forest"):
        model.model(torch.tensor([A]))


def test_dropout_in_attention_is_refused_while_training():
    model = build("llama", attention_dropout=0.1)
    prepare_model(model)
    forest_paths(model, "prefix")
    model.train()
    with pytest.raises(ValueError, match=r"dropout 0\.1"):
        forest_paths(model, "prefix")


def test_preparing_leaves_every_module_in_its_mode():
    model = build("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    prepare_model(model)
    assert [m.training for m in model.modules()] == modes

    def fail():
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in model.modules()] == modes


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


# ---- Refusals ----


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


def test_small_vocabularies_and_models_without_weights():
    assert prepare_model(build("llama", vocab_size=3)).path == "shared"
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**COMMON))
    assert prepare_model(model).path == "shared"


# ---- Checks of a run ----

EXAMPLE = {"prompt_ids": [7, *A * 3], "chosen_ids": [5, 6, 7] * 10, "rejected_ids": [5, 6, 8, 9]}


def test_verify_sharing():
    no_prompt = {"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [5]}
    for name in ("llama", "mistral", "stablelm"):
        model = build(name)
        plan = prepare_model(model)
        for share in ("prefix", "prompt", "none") if plan.share else ("none",):
            for example in (EXAMPLE, no_prompt):
                assert verify.verify_sharing(model, plan, [example], share) < 1e-5


def test_verify_sharing_finds_sabotage(monkeypatch):
    model = build("llama")
    plan = prepare_model(model)
    real = attention.block_attention

    def blind(query, key, value, forest, scale, *rest):
        """Every token sees all rows before it: `subtree_end` is ignored."""
        forest = copy.copy(forest)
        forest.spans, forest.parents, forest.cache = ((0, forest.rows),), (-1,), {}
        return real(query, key, value, forest, scale, *rest)

    monkeypatch.setattr(attention, "block_attention", blind)
    with pytest.raises(ValueError, match=r"verification failed: a token's log-prob differs by .* share='prefix'"):
        verify.verify_sharing(model, plan, [EXAMPLE], "prefix")
    monkeypatch.setattr(attention, "block_attention", real)
    forward = model.forward

    def one_token_off(**kwargs):
        out = forward(**kwargs)
        if "forest" in kwargs:
            out["token_logps"][3] += 2e-3
        return out

    model.forward = one_token_off
    with pytest.raises(ValueError, match=r"differs by 0\.002 nats"):
        verify.verify_sharing(model, plan, [EXAMPLE], "prefix")
    model.forward = forward
    monkeypatch.setattr(attention, "block_attention", lambda *args: real(*args) * float("nan"))
    with pytest.raises(ValueError, match="differs by nan"):
        verify.verify_sharing(model, plan, [EXAMPLE], "prefix")


def test_check_start(caplog):
    zero = torch.zeros(4)
    assert verify.check_start(zero, zero + 1e-4, low_precision=False)
    assert verify.check_start(zero, zero + 0.05, low_precision=True)
    assert not caplog.records
    assert not verify.check_start(zero, torch.tensor([0, 0, -3e-4, 0]), low_precision=False)
    assert not verify.check_start(zero, torch.tensor([0, 0.2, 0, 0]), low_precision=True)
    assert not verify.check_start(zero, zero * float("nan"), low_precision=True)
    assert "policy and reference differ before the first step" in caplog.text


# ---- Mixture of experts ----


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


# ---- Wrappers ----


def with_lora(model, **options):
    config = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **options})
    wrapped = get_peft_model(model, config).double().eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=rng, dtype=p.dtype) * 0.3)
    return wrapped


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
