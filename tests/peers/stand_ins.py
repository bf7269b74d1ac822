"""Tiny models and data in folders with the hub names that TRL's tests load, so that a run in that folder needs no network."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HUB = "trl-internal-testing"
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
# Hub name -> model type and changes of its configuration.
MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}),
    "tiny-Cohere2ForCausalLM": ("cohere2", {"logit_scale": 0.125}),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", {**_EXPERTS, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}),
    "tiny-GptOssForCausalLM": ("gpt_oss", {**_EXPERTS, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", {**_EXPERTS, "moe_intermediate_size": 16, "head_dim": 8}),
    "tiny-NemotronHForCausalLM-nano": (
        "nemotron_h",
        {"hybrid_override_pattern": "M*", "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    ),
    "tiny-Olmo3ForCausalLM": ("olmo3", {}),
    "tiny-Lfm2ForCausalLM": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "tiny-Lfm2ForCausalLM-2.5": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}  # fmt: skip
_REMOTE = """
from transformers import Qwen2Config, Qwen2ForCausalLM
class RemoteConfig(Qwen2Config):
    model_type = "remote"
class RemoteForCausalLM(Qwen2ForCausalLM):
    config_class = RemoteConfig
"""


def sentences(count: int) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of plain words."""
    rng = random.Random(0)
    words = [
        "red",
        "green",
        "blue",
        "small",
        "large",
        "quick",
        "slow",
        "warm",
        "cold",
        "round",
        "square",
        "bright",
        "dark",
        "old",
        "new",
        "tall",
    ]

    def some(n):
        return " ".join(rng.choice(words) for _ in range(n))

    return [(f"The {some(3)} thing is", f" {some(3)}.", f" {some(2)}.") for _ in range(count)]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of ChatML and a template that takes tools."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = ["".join(row) for row in sentences(200)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=_SPECIAL, initial_alphabet=alphabet)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_CHAT
    )


def write(folder: Path) -> None:
    """Write all stand-ins below `folder`."""
    ids = tokenizer()
    special = {"vocab_size": len(ids), "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2}
    for name, (kind, changes) in MODELS.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **special, **changes})
        _save(transformers.AutoModelForCausalLM.from_config(config), ids, folder / HUB / name)
    _save(_vision(len(ids), special), ids, folder / HUB / "tiny-Qwen2_5_VLForConditionalGeneration")
    remote = folder / HUB / "tiny-RemoteForCausalLM"
    _save(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES, **special)), ids, remote)
    (remote / "remote.py").write_text(_REMOTE)
    found = json.loads((remote / "config.json").read_text())
    auto = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    (remote / "config.json").write_text(
        json.dumps({**found, "model_type": "remote", "architectures": ["RemoteForCausalLM"], "auto_map": auto})
    )
    _write_data(folder)


def _vision(words: int, special: dict) -> transformers.PreTrainedModel:
    """A vision-language model without its image processor: text data alone."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1]}
    text = {**_SIZES, **special, "vocab_size": words + 4, "rope_parameters": rope}
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    tokens = {"image_token_id": words, "video_token_id": words + 1}
    edges = {"vision_start_token_id": words + 2, "vision_end_token_id": words + 3}
    config = transformers.AutoConfig.for_model(
        "qwen2_5_vl", text_config=text, vision_config={**eyes, "fullatt_block_indexes": [0]}, **tokens, **edges
    )
    return transformers.AutoModelForImageTextToText.from_config(config)


def _save(model, ids, folder: Path) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    ids.save_pretrained(folder)


def _write_data(folder: Path) -> None:
    texts = sentences(19)
    users = [[{"role": "user", "content": p}] for p, _, _ in texts]
    answers = [[[{"role": "assistant", "content": side.strip()}] for side in row[1:]] for row in texts]
    zen = {
        "standard_preference": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts],
        "standard_implicit_prompt_preference": [{"chosen": p + c, "rejected": p + r} for p, c, r in texts],
        "standard_unpaired_preference": [{"prompt": p, "completion": c, "label": True} for p, c, _ in texts],
        "conversational_preference": [
            {"prompt": u, "chosen": c, "rejected": r} for u, (c, r) in zip(users, answers, strict=True)
        ],
        "conversational_implicit_prompt_preference": [
            {"chosen": u + c, "rejected": u + r} for u, (c, r) in zip(users, answers, strict=True)
        ],
    }
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "weather", "description": "Say it.", "parameters": parameters}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    tools = [
        {
            "prompt": u,
            "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
            "rejected": [{"role": "assistant", "content": "No.", "tool_calls": []}],
            "tools": [tool],
        }
        for u in users
    ]
    for name, configs in (
        ("zen", zen), ("toolcall", {"preference": tools}), ("harmony", {"preference": zen["conversational_preference"]}),
    ):  # fmt: skip
        where = folder / HUB / name
        where.mkdir(parents=True)
        lines = ["---", "configs:"]
        for config, rows in configs.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            for split, part in (("train", rows[:-2]), ("test", rows[-2:])):
                (where / f"{config}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
                lines += [f"  - split: {split}", f"    path: {config}-{split}.jsonl"]
        (where / "README.md").write_text("\n".join([*lines, "---", ""]))
