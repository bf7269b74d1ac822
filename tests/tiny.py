"""Tiny models and pairs that the trainer's tests share. Nothing is read from outside the project."""

import random

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 61


def llama(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> LlamaForCausalLM:
    """A Llama of two layers, 16 wide, with weights large enough that log-probs differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, **changes,
        }
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def llava(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """`llama` beside a vision tower, which text does not use."""
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 16,
    }  # fmt: skip
    text = llama().config.to_dict()
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=VOCABULARY - 1)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def pairs(count: int, seed: int = 0, longest: int = 12) -> list[dict]:
    """Random tokenised pairs; some share a prompt, some a response prefix."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]

    prompts = [ids(2, longest) for _ in range(max(1, count - count // 4))]
    rows = []
    for i in range(count):
        start = ids(0, 3)
        chosen, rejected = start + ids(1, longest), start + ids(1, longest)
        if chosen == rejected:
            rejected = [*rejected, 5]
        rows.append({"prompt_ids": prompts[i % len(prompts)], "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def sequence_logp(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Summed log-prob of a completion by the model's own forward: no forest, no padding, one sequence."""
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([prompt + completion], device=device), use_cache=False).logits[0]
    logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(completion, device=device)[:, None]).sum()


def pair_logps(model, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] chosen and [B] rejected log-probs, one sequence at a time."""
    chosen = torch.stack([sequence_logp(model, r["prompt_ids"], r["chosen_ids"]) for r in rows])
    rejected = torch.stack([sequence_logp(model, r["prompt_ids"], r["rejected_ids"]) for r in rows])
    return chosen, rejected
