"""Options of the command line: flags, YAML, TRL's names and defaults, what is refused, and where pairs come from."""

import dataclasses
import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")

from dpo_fast import DPOConfig
from dpo_fast.cli import options
from dpo_fast.cli.options import eval_sources, train_sources
from dpo_fast.cli.parse import parse
from dpo_fast.data.sources import Pairs, Source, split_pairs
from dpo_fast.train import read_config
from dpo_fast.training import config

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
        "lora_target_modules: all-linear\nuse_peft: true\nlr_scheduler_kwargs: {a: 1}\nenv: {DPO_FAST_TEST: 7}\n"
    )
    script, args, model = parse(["--beta", "0.2", "--dataset_name", "c"], read_config(["--config", str(file)]))
    assert os.environ["DPO_FAST_TEST"] == "7"
    assert (script.dataset_name, args.beta, args.learning_rate) == (["c"], 0.2, 5e-7)
    assert (args.loss_type, args.report_to, args.max_length) == (["hinge"], ["tensorboard"], None)
    assert (args.eval_strategy, args.disable_dropout, args.lr_scheduler_kwargs) == ("no", False, {"a": 1})
    assert model.lora_target_modules == "all-linear"


@pytest.mark.parametrize("text", ["- a\n", "a: [1\n", "1: 2\n", "env: [a]\n"])
def test_yaml_that_is_no_mapping_of_options_is_refused(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml"):
        read_config([f"--config={file}"])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("learning_rat", "learning_rate"), ("torch_dtype", "dtype"), ("qqqqqq", "--help"), ("num_processes", "launch")],
)
def test_an_unknown_option_is_named_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"{name}.*{nearest}"):
        parsed(**{name: 1})
    with pytest.raises(ValueError, match=f"--{name}.*{nearest}"):
        parse([f"--{name}", "1"], BASE)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_steps", "x"), ("max_steps", 1.5), ("beta", [1]), ("dtype", "int8"), ("seed", None), ("bf16", "maybe")],
)
def test_a_yaml_value_of_the_wrong_type_is_refused(name, value):
    with pytest.raises(ValueError, match=f"option {name}"):
        parsed(**{name: value})


# A value that each option of REFUSED does not take.
OTHER = {
    "dataset_streaming": True, "streaming": True, "lora_task_type": "SEQ_CLS", "load_in_8bit": True,
    "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True, "bnb_4bit_quant_storage": "uint8",
    "truncation_mode": "keep_end", "pad_to_multiple_of": 8,
    "dataset_num_proc": 2, "activation_offloading": True, "pad_token": "x", "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True}, "torch_compile": True, "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1, "train_sampling_strategy": "group_by_length", "auto_find_batch_size": True,
    "use_cache": True, "average_tokens_across_devices": False, "bf16_full_eval": True, "fp16_full_eval": True,
    "torch_empty_cache_steps": 5, "include_num_input_tokens_seen": True, "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True, "eval_do_concat_batches": False, "eval_use_gather_object": True,
    "eval_accumulation_steps": 2, "do_predict": True, "label_names": ["x"], "length_column_name": "n",
    "parallelism_config": "x",
}  # fmt: skip


def test_every_refused_option_is_tried():
    assert set(OTHER) == set(options.REFUSED) | set(config.REFUSED)


@pytest.mark.parametrize("name", OTHER)
def test_refused_options_are_named(name):
    with pytest.raises(ValueError, match=name):
        parsed(**{name: OTHER[name]})


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("lora_r", {"lora_r": 4}),
        ("use_dora", {"use_dora": True}),
        ("lora_dropout", {"use_peft": True, "lora_dropout": 0.1}),
        ("eval_dataset_name", {"eval_dataset_name": "x"}),
        ("dataset_test_split", {"dataset_test_split": "x"}),
        ("eval_steps", {"eval_steps": 5}),
        ("test_split_size", {"test_split_size": 0.1}),
        ("eval_dataset_name", {"test_split_size": 0.1, "eval_strategy": "epoch", "eval_dataset_name": "x"}),
        ("dataset_name", {"datasets": [{"path": "x"}]}),
        ("ref_model_mixup_alpha", {"ref_model_mixup_alpha": 0.5}),
    ],
)
def test_options_without_effect_are_named(name, others):
    with pytest.raises(ValueError, match=f"{name} has no effect"):
        parsed(**others)


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
        ({"path": "x", "columns": ["prompt"]}, "columns"),
        ({"path": "json", "data_files": "x"}, "data_files"),
        ({"path": "x", "data_dir": "d"}, "data_dir"),
        ({"path": "x", "splt": "d"}, "unknown option splt: did you mean split"),
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
