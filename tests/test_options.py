"""Options of the command line: flags, YAML, TRL's names and defaults, what is refused, and where pairs come from."""

import dataclasses
import os
import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")

from dpo_fast import DPOConfig
from dpo_fast.cli import options
from dpo_fast.cli.config_file import read_config
from dpo_fast.cli.options import eval_sources, train_sources
from dpo_fast.cli.parse import parse
from dpo_fast.data.readers import Source
from dpo_fast.data.sources import Pairs, split_pairs
from dpo_fast.training import config, unused

BASE = {"model_name_or_path": "model", "dataset_name": "pairs", "use_cpu": True}


def parsed(**changes):
    return parse([], BASE | changes)


@pytest.fixture
def train_file(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return str(tmp_path / "pairs.jsonl")


# Options.


def test_flags_become_options():
    argv = (
        "--model_name_or_path m --dataset_name a b --dataset_weights 1 0.5 --learning-rate 5e-7 --loss_type sigmoid sft"
    )
    flags = (
        "--loss_weights 1 -0.5 --max_length none --bf16 --no_precompute_ref_log_probs --use_peft --lora_r 4 --use_cpu"
    )
    script, args, model = parse([*argv.split(), *flags.split(), "--no_remove_unused_columns"], {})
    assert (script.dataset_name, script.dataset_weights) == (["a", "b"], [1.0, 0.5])
    assert (args.learning_rate, args.loss_type, args.loss_weights) == (5e-7, ["sigmoid", "sft"], [1.0, -0.5])
    assert (args.max_length, args.bf16, args.precompute_ref_log_probs) == (None, True, False)
    assert (model.use_peft, model.lora_r, model.dtype) == (True, 4, "float32")


def test_yaml_is_read_and_flags_override_it(tmp_path, monkeypatch):
    monkeypatch.delenv("DPO_FAST_TEST", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    file = tmp_path / "c.yaml"
    file.write_text(
        "model_name_or_path: m\ndataset_name: [a, b]\nuse_cpu: true\nlearning_rate: 5e-7\nloss_type: hinge\n"
        "report_to: [tensorboard]\neval_strategy: no\nmax_length: null\nno_disable_dropout: true\nbeta: 0.3\n"
        "lora_target_modules: all-linear\nuse_peft: true\nlr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 1}\nenv: {DPO_FAST_TEST: 7}\n"
    )
    script, args, model = parse(["--beta", "0.2", "--dataset_name", "c"], read_config(["--config", str(file)])[1])
    assert os.environ["DPO_FAST_TEST"] == "7"
    assert (script.dataset_name, args.beta, args.learning_rate) == (["c"], 0.2, 5e-7)
    assert (args.loss_type, args.report_to, args.max_length) == (["hinge"], ["tensorboard"], None)
    assert (args.eval_strategy, args.disable_dropout, args.lr_scheduler_kwargs) == ("no", False, {"num_cycles": 1})
    assert model.lora_target_modules == "all-linear"


@pytest.mark.parametrize("text", ["- a\n", "a: [1\n", "1: 2\n", "env: [a]\n"])
def test_yaml_that_is_no_mapping_of_options_is_refused(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml"):
        read_config([f"--config={file}"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("learning_rat", "did you mean learning_rate"),
        ("torch_dtype", "now dtype"),
        ("qqqqqq", "--help"),
        ("num_processes", "accelerate launch --num_processes N -m"),
        ("accelerate_config", "accelerate launch --config_file FILE -m"),
        ("overwrite_output_dir", "leave it out"),
    ],
)
def test_an_unknown_option_is_named_with_what_to_write_instead(name, hint):
    for found in (lambda: parsed(**{name: 1}), lambda: parse([f"--{name}", "1"], BASE)):
        with pytest.raises(ValueError, match=f"unknown option (--)?{name}.*{hint}") as error:
            found()
        assert ("did you mean" in str(error.value)) == (name == "learning_rat")


def test_all_unknown_options_of_a_file_are_in_one_message():
    with pytest.raises(ValueError, match=r"my\.yaml: unknown options torch_dtype .*, qqqqqq, learning_rat .*") as error:
        parse([], BASE | {"torch_dtype": None, "beta": 0.1, "qqqqqq": 1, "learning_rat": 2}, "my.yaml")
    assert "beta" not in str(error.value)
    with pytest.raises(ValueError, match="unknown options --foo, --torch-dtype"):
        parse(["--foo", "1", "--torch-dtype", "x"], BASE)


def test_a_wrong_value_in_a_file_names_the_file():
    with pytest.raises(ValueError, match=r"my\.yaml: option max_steps"):
        parse([], BASE | {"max_steps": "x"}, "my.yaml")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("beta: 1\nseed: 2\nbeta: 1\n", "beta twice, in lines 1 and 3"),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 2\n", "a twice"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path, text, lines):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"c\.yaml gives {lines}"):
        read_config(["--config", str(tmp_path / "c.yaml")])


def test_merged_keys_of_yaml_are_no_repetition(tmp_path):
    (tmp_path / "c.yaml").write_text("model_init_kwargs: &a {x: 1}\nlr_scheduler_kwargs: {<<: *a, y: 2}\n")
    assert read_config(["--config", str(tmp_path / "c.yaml")])[1]["lr_scheduler_kwargs"] == {"x": 1, "y": 2}


@pytest.mark.parametrize("value", ["-1e-5", "-1E5", "-3", "-.5", "-2.e+3", "-0.25"])
def test_a_negative_number_is_a_value(value):
    _, args, _ = parse(["--loss_type", "sigmoid", "sft", "--loss_weights", "1", value], BASE)
    assert args.loss_weights == [1.0, float(value)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_steps", "x"), ("max_steps", 1.5), ("beta", [1]), ("dtype", "int8"), ("seed", None), ("bf16", "maybe")],
)
def test_a_yaml_value_of_the_wrong_type_is_refused(name, value):
    with pytest.raises(ValueError, match=f"option {name}"):
        parsed(**{name: value})


# A value that each option of REFUSED does not take.
OTHER = {
    "dataset_streaming": True, "streaming": True, "lora_task_type": "SEQ_CLS", "neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False, "parallelism_config": "x",
}  # fmt: skip


def test_every_refused_option_is_tried():
    assert set(OTHER) == set(options.REFUSED) | set(config.REFUSED)


@pytest.mark.parametrize("name", OTHER)
def test_refused_options_are_named(name):
    with pytest.raises(ValueError, match=name):
        parsed(**{name: OTHER[name], "use_peft": True})


def test_refused_options_are_named_together():
    with pytest.raises(ValueError, match=r" streaming=True .*, lora_task_type='SEQ_CLS' .*remove them"):
        parsed(streaming=True, lora_task_type="SEQ_CLS", use_peft=True)


# A value that each option of UNUSED is not used with.
NOT_USED = {
    "pad_token": "x", "pad_to_multiple_of": 8, "length_column_name": "n",
    "remove_unused_columns": True, "label_names": ["x"], "auto_find_batch_size": True, "activation_offloading": True,
    "torch_empty_cache_steps": 5, "use_cache": True,
    "torch_compile": True, "torch_compile_backend": "inductor", "torch_compile_mode": "default", "bf16_full_eval": True,
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


def test_names_handed_on_are_checked(monkeypatch):
    with pytest.raises(ValueError, match=r"lr_scheduler_kwargs=.*lr_scheduler_type=cosine.*'nope'"):
        parsed(lr_scheduler_type="cosine", lr_scheduler_kwargs={"nope": 1})
    with pytest.raises(ValueError, match=r"lr_scheduler_type=cosine_with_min_lr: .*min_lr"):
        parsed(lr_scheduler_type="cosine_with_min_lr")
    assert parsed(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-8})
    with pytest.raises(ValueError, match=r"lora_target_modules: 'q_proj\(' is not a valid pattern"):
        parsed(use_peft=True, lora_target_modules="q_proj(")
    monkeypatch.setattr(config, "is_deepspeed_available", lambda: False)
    with pytest.raises(ImportError, match=r"deepspeed='d.json' needs.*pip install deepspeed"):
        parsed(deepspeed="d.json")


def test_what_a_run_cannot_do_without():
    with pytest.raises(ValueError, match="--model_name_or_path"):
        parse(["--dataset_name", "x", "--use_cpu"], {})
    with pytest.raises(ValueError, match="--dataset_name"):
        parse(["--model_name_or_path", "x", "--use_cpu"], {})


# TRL's options.


def trl_classes():
    trl = pytest.importorskip("trl")
    return trl.ScriptArguments, trl.DPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig


def test_every_option_of_trl_is_one_here():
    ours = {f.name for c in (options.ScriptArguments, DPOConfig, options.ModelArguments) for f in dataclasses.fields(c)}
    theirs = {f.name for c in trl_classes() for f in dataclasses.fields(c)}
    assert len(theirs) > 150
    assert theirs <= ours


def test_the_keys_of_a_mixture_are_those_of_trl():
    entry = pytest.importorskip("trl.scripts.utils").DatasetConfig
    assert {f.name for f in dataclasses.fields(entry)} == set(options.ENTRY)


def test_model_options_have_the_defaults_of_trl():
    theirs = {f.name: f.default for f in dataclasses.fields(trl_classes()[2])}
    ours = {f.name: f.default for f in dataclasses.fields(options.ModelArguments)}
    assert theirs == {name: ours[name] for name in theirs}


def test_defaults_of_trl_are_accepted_when_they_are_written_out():
    defaults = {}
    for cls in trl_classes():
        for f in dataclasses.fields(cls):
            value = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            defaults[f.name] = getattr(value, "value", value)
    script, args, model = parse([], defaults | BASE)
    assert args.learning_rate == 1e-6
    assert args.precompute_ref_log_probs is False  # TRL's default
    assert not args.remove_unused_columns
    assert (script.dataset_test_split, model.lora_r) == ("test", 16)


# Sources.


def test_datasets_of_trl_become_sources(train_file):
    script, _, _ = parsed(
        dataset_name=None,
        datasets=[{"path": train_file, "split": "train"}, {"path": "org/x", "name": "n", "split": "s"}, "org/y"],
        dataset_weights=[1, 2, 0.5],
    )
    assert train_sources(script) == [
        Source(train_file),
        Source("org/x", 2.0, "s", "n"),
        Source("org/y", 0.5),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "x", "fraction": 0.5}, "fraction=0.5.*dataset_weights"),
        ({"path": "json", "data_files": "x"}, "data_files"),
        ({"path": "x", "data_dir": "d"}, "data_dir"),
        ({"path": "x", "splt": "d"}, r"unknown option splt \(did you mean split\?\)"),
        ({"name": "x"}, "path"),
    ],
)
def test_what_a_mixture_cannot_say_is_named(entry, message):
    with pytest.raises(ValueError, match=message):
        train_sources(parsed(dataset_name=None, datasets=[entry])[0])


def test_weights_and_splits_that_do_not_fit_are_refused(train_file):
    with pytest.raises(ValueError, match="dataset_weights has 2 numbers for 1"):
        train_sources(parsed(dataset_weights=[1, 2])[0])
    with pytest.raises(ValueError, match="dataset_train_split has no effect"):
        train_sources(parsed(dataset_name=train_file, dataset_train_split="x")[0])
    with pytest.raises(ValueError, match=r"has no split 'test'.*--eval_dataset_name"):
        eval_sources(parsed(dataset_name=train_file, eval_strategy="epoch")[0])


def test_a_split_holds_whole_prompts_out():
    rows = [{"prompt": str(i // 3), "chosen": str(i), "rejected": "x"} for i in range(30)]
    rest, held = split_pairs(Pairs(rows=rows), 0.2, seed=1)
    assert len(held.rows) == 6
    assert sorted(r["chosen"] for r in rest.rows + held.rows) == sorted(r["chosen"] for r in rows)
    assert not {r["prompt"] for r in rest.rows} & {r["prompt"] for r in held.rows}
    assert split_pairs(Pairs(rows=rows), 0.2, seed=1)[1].rows == held.rows
    assert split_pairs(Pairs(rows=rows), 0.2, seed=2)[1].rows != held.rows
    assert len(split_pairs(Pairs(rows=rows), 4)[1].rows) == 6
    with pytest.raises(ValueError, match="no pair on one side"):
        split_pairs(Pairs(rows=rows), 30)
