"""QLoRA: a base in 4 or 8 bits stays frozen and quantised, is shared exactly, and its adapters are PEFT's own files."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")

import tiny
import tokenizers
from peft import LoraConfig, PeftModel
from test_distributed import FSDP, spec, start
from test_resume import history, options
from test_sharded import SHARDED
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.cli.parse import parse
from dpo_fast.train import main
from dpo_fast.training.quantised import is_quantised, settle

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0}
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose widths are whole blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("quantised")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    tiny.llama(dtype=torch.float32, **sizes).save_pretrained(folder / "model")
    return folder


def trainer(folder, name="run", quantised=FOUR, **changes) -> DPOTrainer:
    args = options(folder / name, **{"max_steps": 3, "save_steps": 3, "ref_cache_dir": None, **changes})
    return DPOTrainer(
        str(folder / "model"), args=DPOConfig(**args), train_dataset=tiny.pairs(16), peft_config=LoraConfig(**LORA),
        quantization_config=BitsAndBytesConfig(**quantised),
    )  # fmt: skip


def codes(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if is_quantised(p)}


KINDS = {"nf4": FOUR, "nested": {**FOUR, "bnb_4bit_use_double_quant": True}, "int8": {"load_in_8bit": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_stays_frozen_and_quantised(folder, kind):
    run = trainer(folder, kind, KINDS[kind])
    before = codes(run.model)
    assert len(before) == 14  # seven projections in each of two layers
    run.train()
    after = codes(run.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert any(p.any() for name, p in run.model.named_parameters() if "lora_B" in name)
    # On a CPU, bitsandbytes multiplies 8-bit weights in one way in training and in another one in evaluation.
    assert run.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=5e-3 if kind == "int8" else 1e-5)


def test_shared_equals_unshared(folder, tmp_path):
    """Of the quantised model: log-probs over the forest are those of each sequence alone, and so is a run without sharing."""
    run = trainer(folder, "shared", save_strategy="no")
    rows = tiny.pairs(6)
    forest = torch.stack(run.compute_ref_log_probs(run.model, run.data_collator(rows)))
    with torch.no_grad():
        alone = torch.stack(tiny.pair_logps(run.model, rows))
    torch.testing.assert_close(forest, alone, rtol=1e-5, atol=1e-4)
    run.train()
    other = trainer(folder, "unshared", save_strategy="no", share="none")
    other.train()
    for got, want in zip(run.state.log_history, other.state.log_history, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins") if "loss" in want else ():
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name


def test_the_checkpoint_loads_in_peft_and_resumes(folder, tmp_path):
    whole = trainer(folder, "whole", max_steps=4, save_steps=2)
    whole.train()
    whole.save_model(tmp_path / "adapters")
    assert json.loads((tmp_path / "adapters/adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype="float32", quantization_config=BitsAndBytesConfig(**FOUR)
    )
    loaded = PeftModel.from_pretrained(settle(base), tmp_path / "adapters").eval()
    with torch.no_grad():
        got, want = (torch.stack(tiny.pair_logps(m, tiny.pairs(3))) for m in (loaded, whole.model.eval()))
    assert torch.equal(got, want)
    again = trainer(folder, "whole", max_steps=4, save_steps=2)
    again.train(resume_from_checkpoint=str(folder / "whole/checkpoint-2"))
    for (name, a), b in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_codes_in_shards_are_one_process_and_resume(folder):
    """FSDP2 shards codes that are stored as numbers of its own type; others stay whole on every rank."""
    common = {
        "lora": {**LORA, "init_lora_weights": True},
        "ref_cache_dir": None,
        "model_init_kwargs": {"dtype": "float32"},
    }
    stored = {"quantised": {**FOUR, "bnb_4bit_quant_storage": "float32"}, **common}
    saved = {"save_strategy": "steps", "save_steps": 2}
    start(1, spec(folder, "codes_one", 1, **stored))
    start(
        2,
        spec(folder, "codes_two", 2, **SHARDED, **stored, **saved),
        spec(folder, "codes_whole", 2, **SHARDED, **common, quantised=FOUR),
        spec(folder, "codes_again", 2, **SHARDED, **stored, resume=str(folder / "codes_two_run/checkpoint-2")),
    )
    want, wanted = torch.load(folder / "codes_one.pt", weights_only=True), history(folder, "codes_one")
    for name in ("codes_two", "codes_whole", "codes_again"):
        got = torch.load(folder / f"{name}.pt", weights_only=True)
        for key in (k for k in want if "lora_" in k):
            torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5)
        assert [row["loss"] for row in history(folder, name) if "loss" in row] == pytest.approx(
            [row["loss"] for row in wanted if "loss" in row], rel=1e-5
        )


def test_what_shards_would_change_is_said_before_the_weights_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)

    def refused(match, quantised, **changes):
        args = DPOConfig(**options(tmp_path / "run", ref_cache_dir=None, **FSDP, **changes))
        given = {"peft_config": LoraConfig(**LORA), "quantization_config": BitsAndBytesConfig(**quantised)}
        with pytest.raises(ValueError, match=match):
            DPOTrainer(str(folder / "model"), args=args, train_dataset=tiny.pairs(4), **given)

    half = {**FOUR, "bnb_4bit_quant_storage": "float16"}
    refused("casts what it gathers to bfloat16, codes too: set bnb_4bit_quant_storage=bfloat16", half, bf16=True)
    refused("cannot shard weights in 8 bits", {"load_in_8bit": True})


def test_what_cannot_be_is_said_before_the_weights_are_read(folder, tmp_path, monkeypatch):
    args = DPOConfig(**options(tmp_path / "run", ref_cache_dir=None))
    four = BitsAndBytesConfig(**FOUR)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)

    def refused(match, model=str(folder / "model"), kind=ValueError, **given):
        with pytest.raises(kind, match=match):
            DPOTrainer(model, **{"args": args, "train_dataset": tiny.pairs(4), "quantization_config": four, **given})

    refused("nothing to train: add adapters")
    refused("already loaded", model=loaded, peft_config=LoraConfig(**LORA))
    refused("give a BitsAndBytesConfig", quantization_config=object())
    refused("give a BitsAndBytesConfig", quantization_config={"quant_method": "gptq", "bits": 4})
    refused("has no load_in_3bit", quantization_config={"load_in_4bit": True, "load_in_3bit": True})
    twice = DPOConfig(**options(tmp_path / "run", ref_cache_dir=None, model_init_kwargs={"quantization_config": FOUR}))
    refused("given twice", args=twice, peft_config=LoraConfig(**LORA))
    refused("nothing to train: add adapters", args=twice, quantization_config=None)
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    refused("pip install bitsandbytes", kind=ImportError)


def test_a_quantised_head_is_refused(folder):
    with pytest.raises(ValueError, match=r"head is quantised.*llm_int8_skip_modules"):
        trainer(folder, "head", {**FOUR, "llm_int8_skip_modules": ["none"]})


def test_the_options_of_the_command_line():
    def read(*flags):
        return parse(["--model_name_or_path", "m", "--dataset_name", "d", *flags], {})[2]

    assert read("--use_peft").quantization_config() is None
    found = read(
        *("--use_peft", "--load_in_4bit", "--dtype", "bfloat16", "--bnb_4bit_quant_type", "fp4"),
        *("--use_bnb_nested_quant", "--bnb_4bit_quant_storage", "bfloat16"),
    ).quantization_config()
    assert found.load_in_4bit
    assert (found.bnb_4bit_compute_dtype, found.bnb_4bit_quant_storage) == (torch.bfloat16, torch.bfloat16)
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("fp4", True)
    assert read("--use_peft", "--load_in_8bit").quantization_config().load_in_8bit
    with pytest.raises(ValueError, match="instead of auto"):
        read("--use_peft", "--load_in_4bit", "--dtype", "auto").quantization_config()
    with pytest.raises(ValueError, match="exclude each other"):
        read("--use_peft", "--load_in_4bit", "--load_in_8bit")


def test_a_run_of_the_command_line(folder, tmp_path):
    """bfloat16 codes that read as numbers would be nan: they are not looked at."""
    tokens = tokenizers.models.WordLevel({f"t{i}": i for i in range(tiny.VOCABULARY)}, unk_token="t3")
    fast = tokenizers.Tokenizer(tokens)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="t2").save_pretrained(folder / "model")
    rows = [{"prompt": f"t{i} t5", "chosen": f"t7 t{i + 1}", "rejected": "t8"} for i in range(4, 12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        *("--model_name_or_path", str(folder / "model"), "--dataset_name", str(tmp_path / "pairs.jsonl")),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "--no_bf16", "--use_peft"),
        *("--load_in_4bit", "--dtype", "bfloat16", "--bnb_4bit_quant_storage", "bfloat16", "--report_to", "none"),
    ]
    assert main(argv) == 0
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
