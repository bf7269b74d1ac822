"""Options that would have no effect: refused where they would change what is computed, else named in one warning."""

import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")

from option_tools import BASE, parsed

from dpo_fast import DPOConfig
from dpo_fast.cli import options
from dpo_fast.cli.parse import parse
from dpo_fast.training import config, unused

# For each option of REFUSED a value that it does not take.
OTHER = {
    "lora_task_type": "SEQ_CLS", "neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False, "parallelism_config": "x",
}  # fmt: skip


def test_every_refused_option_is_tried():
    assert set(OTHER) == set(options.REFUSED) | set(config.REFUSED)


@pytest.mark.parametrize("name", OTHER)
def test_refused_options_are_named(name):
    with pytest.raises(ValueError, match=name):
        parsed(**{name: OTHER[name], "use_peft": True})


# For each option of UNUSED a value that is not its default.
NOT_USED = {
    "pad_token": "x", "pad_to_multiple_of": 8, "length_column_name": "n",
    "remove_unused_columns": True, "label_names": ["x"], "auto_find_batch_size": True, "activation_offloading": True,
    "torch_empty_cache_steps": 5, "use_cache": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True, "eval_accumulation_steps": 2, "eval_do_concat_batches": False,
    "eval_use_gather_object": True, "batch_eval_metrics": True, "include_for_metrics": ["inputs"], "do_predict": True,
    "include_num_input_tokens_seen": True,
}  # fmt: skip


def warned(caplog) -> str:
    """The one warning."""
    (record,) = caplog.records
    caplog.clear()
    return record.getMessage()


def test_every_unused_option_is_tried():
    assert set(NOT_USED) == set(unused.UNUSED)


@pytest.mark.parametrize("name", NOT_USED)
def test_an_unused_option_is_named_and_gets_its_default(name, caplog):
    for args in (
        lambda: parsed(**{name: NOT_USED[name]})[1],
        lambda: DPOConfig(use_cpu=True, **{name: NOT_USED[name]}),
    ):
        found = args()
        assert re.search(rf"\b{name}\b", warned(caplog))
        assert getattr(found, name) == getattr(DPOConfig(use_cpu=True), name)


SWITCHED_OFF = [
    ("lora_r", {"lora_r": 4}),
    ("lora_target_modules", {"lora_target_modules": "q_proj"}),
    ("lora_task_type", {"lora_task_type": "SEQ_CLS"}),
    ("use_dora", {"use_dora": True}),
    ("lora_dropout", {"use_peft": True, "lora_dropout": 0.1}),
    ("ref_cache_dir", {"use_peft": True, "ref_cache_dir": "x"}),
    ("eval_dataset_name", {"eval_dataset_name": "x"}),
    ("dataset_test_split", {"dataset_test_split": "x"}),
    ("eval_steps", {"eval_steps": 5}),
    ("eval_on_start", {"eval_on_start": True}),
    ("dataset_test_split", {"test_split_size": 0.1, "eval_strategy": "epoch", "dataset_test_split": "x"}),
    ("hub_model_id", {"hub_model_id": "a/b"}),
    ("hub_token", {"hub_token": "x"}),
    ("bnb_4bit_quant_type", {"bnb_4bit_quant_type": "fp4"}),
    ("bnb_4bit_quant_type", {"bnb_4bit_quant_type": "fp4", "load_in_8bit": True}),
    ("group_by_length", {"group_by_length": True}),
    ("train_sampling_strategy", {"train_sampling_strategy": "group_by_length"}),
    ("columns", {"dataset_name": None, "datasets": [{"path": "x", "columns": ["chosen"]}]}),
    ("ref_model_mixup_alpha", {"ref_model_mixup_alpha": 0.5}),
    ("precompute_ref_batch_size", {"precompute_ref_log_probs": False, "precompute_ref_batch_size": 2}),
    ("precompute_ref_log_probs", {"loss_type": "simpo", "precompute_ref_log_probs": True}),
    ("sync_ref_model", {"loss_type": ["orpo"], "sync_ref_model": True}),
    ("discopop_tau", {"discopop_tau": 0.1}),
    ("simpo_gamma", {"simpo_gamma": 0.1}),
    ("f_alpha_divergence_coef", {"f_alpha_divergence_coef": 0.1}),
    ("use_liger_kernel", {"use_liger_kernel": True}),
    ("liger_kernel_config", {"liger_kernel_config": {"rope": True}}),
    ("truncation_mode", {"max_length": None, "truncation_mode": "keep_end"}),
]


@pytest.mark.parametrize(("name", "others"), SWITCHED_OFF)
def test_options_of_parts_that_are_switched_off_are_named(name, others, caplog):
    values = parsed(**others)
    assert re.search(rf"\b{name}\b", warned(caplog))
    defaults = parsed(use_peft=others.get("use_peft", False))
    for got, default in zip(values, defaults, strict=True):
        if hasattr(default, name):
            assert getattr(got, name) == getattr(default, name)


def test_one_warning_names_all_that_is_not_used(caplog):
    parsed(pad_token="x", lora_r=4, lora_alpha=8, eval_steps=3, length_column_name="n")
    text = "pad_token, length_column_name; lora_r, lora_alpha (without use_peft); eval_steps (without evaluation)"
    assert warned(caplog).endswith(text)


def test_what_is_counted_may_be_named(caplog):
    """transformers takes a yes, a no, `all` or `non_padding`; here tokens are always counted."""
    for value in ("all", True):
        parsed(include_num_input_tokens_seen=value)
        assert "include_num_input_tokens_seen" in warned(caplog)
    parse(["--include_num_input_tokens_seen", "non_padding"], BASE)
    assert "include_num_input_tokens_seen" in warned(caplog)


def test_other_processes_of_a_run_do_not_repeat_the_warning(caplog, monkeypatch):
    monkeypatch.setattr(DPOConfig, "process_index", 1)
    assert DPOConfig(use_cpu=True, pad_token="x").pad_token is None
    assert not caplog.records


@pytest.mark.parametrize(
    "others",
    [
        {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1, "disable_dropout": False},
        {"eval_strategy": "steps", "eval_steps": 5, "eval_dataset_name": "x", "eval_on_start": True},
        {"do_eval": True, "eval_dataset_name": "x", "eval_on_start": True},
        {"use_peft": True, "precompute_ref_log_probs": True, "ref_cache_dir": "x"},
        {"loss_type": ["sigmoid", "discopop"], "discopop_tau": 0.1},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.1},
        {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2},
        {"train_sampling_strategy": "sequential", "truncation_mode": "keep_end"},
    ],
)
def test_options_that_are_used_stay(others, caplog):
    found = {name: value for values in parsed(**others) for name, value in vars(values).items()}
    assert not caplog.records
    for name, value in others.items():
        assert found[name] == value or found[name] == [value]


def test_what_would_choose_other_pairs_is_an_error():
    with pytest.raises(ValueError, match="test_split_size would hold pairs out"):
        parsed(test_split_size=0.1)
    with pytest.raises(ValueError, match="eval_dataset_name has no effect beside test_split_size"):
        parsed(test_split_size=0.1, eval_strategy="epoch", eval_dataset_name="x")
    with pytest.raises(ValueError, match="dataset_name has no effect beside datasets"):
        parsed(datasets=[{"path": "x"}])
