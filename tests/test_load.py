"""Loading a model by name: adapters on their base, vision-language classes on text, and one line for each broken file."""

import json

import pytest
import tiny
import torch

pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.training import load
from dpo_fast.training.run_setup import plan_run


@pytest.fixture
def args(tmp_path):
    return DPOConfig(
        output_dir=str(tmp_path / "run"), ref_cache_dir=str(tmp_path / "ref"), report_to="none", use_cpu=True, bf16=False,
        max_steps=1, logging_steps=1, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    tiny.llama(dtype=torch.float32).save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"t{i:02}": i for i in range(tiny.VOCABULARY)}, unk_token="t00"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t00", eos_token="t02", unk_token="t00")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(folder, args, rows=None):
    trainer = DPOTrainer(plan_run(str(folder), args), args=args, train_dataset=rows or tiny.pairs(4))
    trainer.train()
    return trainer


# ---- Adapters, and vision-language models ----


def test_a_folder_of_adapters_is_loaded_on_its_base(folder, tmp_path, args):
    adapted = get_peft_model(
        tiny.llama(dtype=torch.float32), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "lora")
    args.ref_cache_dir = None
    rows = tiny.pairs(4)
    with torch.no_grad():
        expected = tiny.pair_logps(adapted.eval(), rows)
    trainer = run(tmp_path / "lora", args, rows)
    assert isinstance(trainer.model, PeftModel)
    assert trainer.processing_class is not None  # the base model's
    log = trainer.state.log_history[0]
    assert log["logps/chosen"] == pytest.approx(expected[0].mean().item(), rel=1e-5)
    assert log["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert log["grad_norm"] > 0
    (tmp_path / "lora/adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"is damaged or none .*adapter_model\.safetensors"):
        run(tmp_path / "lora", args)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({**config, "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ValueError, match="prefix_tuning is not supported"):
        plan_run(str(tmp_path / "lora"), args)


def test_a_vision_language_class_trains_on_text(tmp_path, args):
    text = {
        "model_type": "llama", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 16,
    }  # fmt: skip
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=60)
    model = AutoModelForImageTextToText.from_config(config)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "llava")
    rows = tiny.pairs(4)
    rows = [{k: [min(i, 59) for i in ids] for k, ids in row.items()} for row in rows]
    with torch.no_grad():
        expected = tiny.pair_logps(model.eval(), rows)
    trainer = run(tmp_path / "llava", args, rows)
    assert type(trainer.model) is type(model)
    assert trainer.state.log_history[0]["logps/chosen"] == pytest.approx(expected[0].mean().item(), rel=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
def test_an_attention_that_is_asked_for_is_answered(folder, args, implementation, caplog):
    args.model_init_kwargs = {"attn_implementation": implementation}
    assert run(folder, args).setup.plan.path == "shared"
    assert f"attn_implementation={implementation} was asked for" in caplog.text


# ---- What is broken ----


def damage(folder, kind):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-500])
    elif kind == "foreign":
        weights.write_bytes(b"PK\x03\x04" * 100)
    elif kind == "shapes":
        config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 32}))
    elif kind == "config":
        config.write_text('{"model_type": "llama", ')
    elif kind == "keys":
        (folder / "tokenizer.json").write_text("{}")
    elif kind == "tokenizer":
        (folder / "tokenizer.json").write_text("not json")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("truncated", r"a safetensors file of .*model is damaged or none .*model\.safetensors"),
        ("foreign", r"a safetensors file of .*model is damaged or none .*model\.safetensors"),
        (
            "shapes",
            r"the weights of .* do not have the shapes of its config\.json: .*mlp.down_proj.weight is \[16, 24\], not \[16, 32\]",
        ),
        ("config", r"config\.json|not valid JSON"),
        ("keys", r"tokenizer files of .*model cannot be read"),
        ("tokenizer", r"tokenizer"),
    ],
)
def test_a_damaged_file_is_named(folder, args, kind, text):
    damage(folder, kind)
    with pytest.raises((ValueError, OSError), match=text):
        run(folder, args)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named(args, value):
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 of 384 numbers"):
        DPOTrainer(model, args=args, train_dataset=tiny.pairs(4))


def test_large_numbers_are_numbers(args):
    model = tiny.llama(dtype=torch.float16)
    model.model.embed_tokens.weight.data[5:25] = 60000.0
    load_free = model.model.embed_tokens.weight.sum()
    assert not load_free.isfinite()  # the sum overflows, no number does
    from dpo_fast.training.start_checks import check_finite

    check_finite(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_longer_than_the_positions_are_refused_before_any_work(args, family):
    from model_families import build

    model = build(family, torch.float32)
    row = {"prompt_ids": [5] * 40, "chosen_ids": [6] * 24, "rejected_ids": [7] * 3}
    DPOTrainer(model, args=args, train_dataset=[row])
    longer = {**row, "rejected_ids": [7] * 25}
    with pytest.raises(ValueError, match=r"1 pairs of the eval data .*=64; pair 1 has 65\): set max_length to 64"):
        DPOTrainer(model, args=args, train_dataset=[row], eval_dataset=[row, longer])


def test_scaled_positions_have_no_such_end(args):
    from model_families import build

    row = {"prompt_ids": [5] * 70, "chosen_ids": [6], "rejected_ids": [7] * 3}
    for family in ("dynamic rope", "bloom"):
        DPOTrainer(build(family, torch.float32), args=args, train_dataset=[row])


def test_no_network_is_said_at_once(args, monkeypatch):
    import huggingface_hub

    asked = []

    def unreachable(self, name, *, timeout, **_):
        asked.append(timeout)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    for call in (load.load_tokenizer, load.load_config, load.adapter_base):
        with pytest.raises(ValueError, match=r"no model 'nobody/nothing'.*the hub cannot be reached"):
            call("nobody/nothing", args)
    assert asked == [5, 5, 5]  # one request each; the hub's own client tries for 24 s per file
