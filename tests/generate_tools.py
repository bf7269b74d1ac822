"""Tiny models of several kinds to sample from, a tokenizer that shows every id, and a run of the engine in the process."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_fast.loop.candidates import Prompt
from dpo_fast.loop.in_process import InProcess
from dpo_fast.loop.sampling import Sampling

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 5},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"state_size": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "stablelm": {},
}
PROMPTS = ["", "a", "to b", "rather long, by far"]


class Ids:
    """A tokenizer of one id per character, so that every sampled id is seen in the text."""

    eos_token_id, chat_template = 2, None

    def __call__(self, text):
        return {"input_ids": [1, *(3 + ord(c) % 58 for c in text)]}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(0x100 + i) for i in ids if i > 2)


def family(name, seed=0):
    config = AutoConfig.for_model(name, **{**SIZES, **FAMILIES[name]})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng) * 0.3 + (0 if p.ndim > 1 else p.data)
    return model.double().eval()


def run(model, prompts, sampling, **options):
    engine = InProcess(model, Ids(), **options)
    return {p.text: c for p, c in engine.run([Prompt(p) for p in prompts], set(), sampling)}


MIXED = Sampling(num_generations=5, temperature=(1.0, 0.7, 0.0), top_p=(1.0, 0.8), max_new_tokens=9, seed=3)
