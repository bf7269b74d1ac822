"""`gradient_checkpointing`, left out: on where the activations would not fit. The same numbers either way."""

import copy
import logging

import pytest
import torch

pytest.importorskip("transformers")

import tiny
import transformers

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.data.pairs import PairDataset
from dpo_fast.forest.model import prepare_model
from dpo_fast.forest.packing import PrefixForest
from dpo_fast.training import checkpointing

NOTHING, PLENTY = 1 << 20, 1 << 50


def config(folder, **changes) -> DPOConfig:
    return DPOConfig(
        **{
            "output_dir": str(folder / "out"), "ref_cache_dir": str(folder / "cache"), "use_cpu": True, "bf16": False,
            "report_to": "none", "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1, "logging_steps": 1,
            "save_strategy": "no", "disable_tqdm": True, **changes,
        }
    )  # fmt: skip


@pytest.fixture
def free(monkeypatch):
    """Sets the free memory of every device."""

    def give(n: int | None) -> None:
        monkeypatch.setattr(checkpointing, "free_bytes", lambda device: n)

    return give


def trained(args, **options) -> DPOTrainer:
    trainer = DPOTrainer(tiny.llama(), args=args, train_dataset=tiny.pairs(8), **options)
    trainer.train()
    return trainer


def test_memory_decides_and_no_number_changes(tmp_path, free, caplog):
    args, found = config(tmp_path), {}
    for n, on in ((PLENTY, False), (NOTHING, True), (None, True)):
        free(n)
        with caplog.at_level(logging.INFO, logger="dpo_fast"):
            trainer = trained(args)
        assert (trainer.args.gradient_checkpointing, trainer.model.is_gradient_checkpointing) == (on, on)
        line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("gradient checkpointing is"))
        assert line == trainer.setup.checkpointing
        assert line.startswith(f"gradient checkpointing is {'on' if on else 'off'}: ")
        assert ("GB" in line and "gradient_checkpointing true or false overrides" in line) == (n is not None)
        found[n] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        caplog.clear()
    assert args.gradient_checkpointing is None  # each run decided for itself
    torch.testing.assert_close(found[NOTHING], found[PLENTY], rtol=0, atol=1e-12)
    start = torch.cat([p.detach().flatten() for p in tiny.llama().parameters()])
    assert (found[PLENTY] - start).abs().max() > 1e-4


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_for_is_done(tmp_path, free, asked):
    free(NOTHING if not asked else PLENTY)
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if name in DPOConfig.defaults():
            trainer = trained(config(tmp_path, **{name: asked}))
            assert trainer.model.is_gradient_checkpointing == asked
            assert trainer.setup.checkpointing == f"gradient checkpointing is {'on' if asked else 'off'}: as asked"


def test_adapters_learn_under_checkpointing(tmp_path, free):
    peft = pytest.importorskip("peft")
    free(NOTHING)
    trainer = trained(
        config(tmp_path, ref_cache_dir=None),
        peft_config=peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    assert trainer.model.is_gradient_checkpointing
    assert any((p != 0).any() for name, p in trainer.model.named_parameters() if "lora_B" in name)


def test_the_largest_batch_counts(tmp_path):
    rows = [
        {"prompt_ids": [5] * prompt, "chosen_ids": [1, 2] + [3] * chosen, "rejected_ids": [1, 4]}
        for prompt, chosen in ((3, 0), (50, 7), (40, 1), (2, 2))
    ]
    data, args = PairDataset(rows), config(tmp_path, per_device_train_batch_size=2)
    assert checkpointing.most_rows(data, args, "prefix") == (50 + 9 + 1 + 40 + 3 + 1, 59)
    assert checkpointing.most_rows(data, args, "none") == (100 + 9 + 2 + 80 + 3 + 2, 59)
    assert checkpointing.most_rows(data, args, "none", padded=True) == (4 * 59, 59)
    args = config(tmp_path, max_tokens_per_batch=70)
    assert checkpointing.most_rows(data, args, "prefix") == (70, 59)
    args = config(tmp_path, tokens_per_step=150, gradient_accumulation_steps=2)
    assert checkpointing.most_rows(data, args, "prefix") == (75, 59)
    assert checkpointing.most_rows(data, args, "none", padded=True) == (2 * 4 * 59, 59)


MODELS = {
    "llama": lambda common: transformers.LlamaConfig(**common, intermediate_size=160, num_key_value_heads=2),
    "gpt2": lambda common: transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=99, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
    ),
    "gemma2": lambda common: transformers.Gemma2Config(**common, intermediate_size=160, num_key_value_heads=2, head_dim=16),
    "mixtral": lambda common: transformers.MixtralConfig(
        **common, intermediate_size=96, num_key_value_heads=2, num_local_experts=4
    ),
}  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_above_what_is_kept_and_not_far(name, half):
    common = {
        "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](common)).train()
    prepare_model(model, workspace_bytes=0)
    ids = torch.randint(3, 99, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    forest = PrefixForest.build([ids[:100]] * 2, [ids[100:220], ids[220:400]])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
        return x

    # Without its cache, what autocast makes of a weight is not kept between layers, but by autograd.
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model(forest=forest)
    measured = sum(n for _, n in kept.values())
    if half:
        measured -= sum(2 * p.numel() for p, _ in checkpointing._trunk_matrices(model))
    estimate = checkpointing.activation_bytes(model, forest.rows, 2 if half else 4, 280)
    assert measured <= estimate <= 2.5 * measured


def test_room_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "CGROUP", tmp_path)
    whole = checkpointing.free_bytes(torch.device("cpu"))
    assert whole > 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 1500\n")
    assert checkpointing.free_bytes(torch.device("cpu")) > 10000
    (tmp_path / "memory.max").write_text("10000\n")
    assert checkpointing.free_bytes(torch.device("cpu")) == 4500


def test_states_of_a_step(tmp_path):
    model = tiny.llama(dtype=torch.float32)
    args = config(tmp_path, workspace_bytes=1000)
    count, head = sum(p.numel() for p in model.parameters()), model.lm_head.weight
    # A gradient and two numbers of AdamW for each weight.
    assert checkpointing.state_bytes(model, None, args, 1) == 12 * count
    assert checkpointing.state_bytes(model, None, args, 4) == 3 * count
    # The reference is on the CPU already.
    assert checkpointing.state_bytes(model, copy.deepcopy(model), args, 1) == 12 * count
    assert checkpointing.state_bytes(tiny.llama(dtype=torch.bfloat16), None, args, 1) == 18 * count
    assert checkpointing.head_bytes(model, args, 2, 4) == 4 * head.numel() + 2 * len(head) * 4
    assert checkpointing.head_bytes(model, args, 100, 4) == 4 * head.numel() + 1000
    head.requires_grad_(False)
    assert checkpointing.head_bytes(model, args, 100, 4) == 100 * len(head) * 4
    assert checkpointing.state_bytes(model, None, args, 1) == 12 * (count - head.numel())
