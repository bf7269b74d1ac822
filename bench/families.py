"""Every causal language model of transformers that can be built tiny, against its own logits in float64.

    python -m bench.families [FAMILY ...]

Random weights, pairs that share prompts and beginnings, rows longer than windows and than the limits of rotary scaling. A
family is `shared` or `padded` where our log-probs are those of the model's own forward (eager attention, one sequence at a
time), `refused` where `prepare_model` says that it cannot, `wrong` where the numbers differ, `not built` where no tiny model
came from its configuration. The exit status is the number of wrong ones.
"""

import copy
import random
import signal
import sys
import warnings

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo_fast.forest.model import prepare_model
from dpo_fast.forest.packing import PrefixForest
from dpo_fast.training.dropout import no_dropout

SECONDS = 120  # per family
LARGEST = 50_000_000  # parameters
TOLERANCE = 1e-5  # nats; many models compute norms and positions in float32
# Each of these names that a family's configuration has, wherever it is.
SIZES = {
    61: ("vocab_size", "vocab_size_per_layer_input"),
    32: (
        "hidden_size", "n_embd", "d_model", "dim", "embed_dim", "lru_width", "word_embed_proj_dim", "embedding_size",
        "input_embedding_size", "attention_hidden_size", "hidden_dim", "n_embed", "mamba_d_ssm",
    ),
    48: (
        "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dense_intermediate_size", "shared_intermediate_size",
        "decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "block_ff_dim",
    ),
    16: ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    2: (
        "num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers", "num_key_value_heads",
        "num_kv_heads", "n_head_kv", "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token",
        "linear_num_key_heads", "num_global_key_value_heads", "moe_top_k", "top_k", "linear_num_value_heads",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "num_experts", "num_local_experts", "n_routed_experts",
        "moe_num_experts", "decoder_attention_heads", "encoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "rotary_dim",
        "qk_rope_head_dim", "num_attention_groups",
    ),
    8: (
        "head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim",
        "mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "state_size", "time_step_rank", "global_head_dim",
        "swa_head_dim", "index_head_dim", "hidden_size_per_layer_input",
    ),
    1: ("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"),
    128: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"),
    6: ("sliding_window", "attention_window_size", "window_size"),
    0: ("pad_token_id",),
    3: ("bos_token_id", "eos_token_id"),
}  # fmt: skip
# What a family needs beside them.
CHANGES: dict[str, dict] = {
    "bamba": {"mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "granitemoehybrid": {"mamba_d_head": 16},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4}},
}  # fmt: skip


def tiny_values(config_class) -> dict:
    """The sizes above for the names that a configuration class has, its parts' included."""
    given = config_class().to_dict()
    names = {name: value for value, names in SIZES.items() for name in names}
    sizes = {n: names[n] for n in names if given.get(n) is not None and not isinstance(given[n], list)}
    if "kv_lora_rank" in sizes:  # each head has keys of its own, partly rotary
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads", 4)
        sizes.pop("head_dim", None)
    if isinstance(given.get("layer_types"), list):
        kinds = list(dict.fromkeys(given["layer_types"]))
        count = max(2, len(kinds))
        sizes["layer_types"] = (kinds * 2)[:count]
        sizes.update({name: count for name in ("num_hidden_layers", "n_layer", "num_layers") if name in sizes})
    if "is_decoder" in given:
        sizes["is_decoder"] = True
    for name in config_class.sub_configs:
        if isinstance(given.get(name), dict) and given[name].get("model_type") in CONFIG_MAPPING:
            part = given[name]["model_type"]
            sizes[name] = {"model_type": part, **tiny_values(CONFIG_MAPPING[part])}
    return sizes


def tiny_model(kind: str) -> torch.nn.Module:
    """Raises ValueError for a family of which these sizes make no small model."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**tiny_values(CONFIG_MAPPING[kind]), **CHANGES.get(kind, {})})
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    no_dropout(model)
    return model.eval()


def pairs(vocabulary: int) -> list[dict]:
    """Three pairs of two prompts, one of 30 tokens; the answers share their beginnings."""
    rng = random.Random(0)

    def ids(count):
        return [rng.randrange(4, vocabulary) for _ in range(count)]

    prompts, start = [ids(30), ids(3)], ids(4)
    return [
        {"prompt_ids": prompts[i % 2], "chosen_ids": start + ids(9 + i), "rejected_ids": start + ids(2 + i)} for i in range(3)
    ]  # fmt: skip


def own_logps(model, rows: list[dict]) -> list[torch.Tensor]:
    """Log-probs of each completion's tokens by the model's own forward, chosen ones first."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            ids = torch.tensor([[*row["prompt_ids"], *row[side]]])
            logits = copy.deepcopy(model)(input_ids=ids, use_cache=False).logits[
                0
            ]  # some keep the longest row's positions
            logps = logits[len(row["prompt_ids"]) - 1 : -1].double().log_softmax(-1)
            found.append(logps.gather(1, torch.tensor(row[side])[:, None])[:, 0])
    return found


@torch.no_grad()
def outcome(kind: str) -> tuple[str, str]:
    """(outcome, remark) of one family."""
    try:
        model = tiny_model(kind)
        if model._can_set_attn_implementation():
            model.set_attn_implementation("eager")
        rows = pairs(model.get_output_embeddings().weight.shape[0])
        want = own_logps(model, rows)
        if not all(x.isfinite().all() for x in want):
            return "not built", "its own log-probs are not finite"
        model.set_attn_implementation("sdpa") if model._can_set_attn_implementation() and model._supports_sdpa else None
    except Exception as error:
        return "not built", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    try:
        plan = prepare_model(model)
    except ValueError as error:
        return "refused", " ".join(str(error).split())
    forest = PrefixForest.from_pairs(rows, share="prefix" if plan.share else "none")
    got = forest.gather_paths(model(forest=forest)["token_logps"])
    worst = max((got[s, : len(x)] - x).abs().max().item() for s, x in enumerate(want))
    model.train()
    drawn = model(forest=forest)["token_logps"] - model(forest=forest)["token_logps"]
    noise = "random in training mode; " if drawn.abs().max() > TOLERANCE else ""
    return (plan.path if worst < TOLERANCE else "wrong"), f"{worst:.1e} {noise}{plan.obstacle or ''}"


def _give_up(*_):
    raise TimeoutError(f"more than {SECONDS} s")


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _give_up)
    found: dict[str, list[str]] = {}
    for kind in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        signal.alarm(SECONDS)
        try:
            result, remark = outcome(kind)
        except Exception as error:
            result, remark = "wrong", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        signal.alarm(0)
        found.setdefault(result, []).append(kind)
        print(f"{result:10s}{kind:28s}{remark}", flush=True)
    print(f"\ntransformers {transformers.__version__}")
    print("\n".join(f"{result}: {len(kinds)}" for result, kinds in sorted(found.items())))
    return len(found.get("wrong", ()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
