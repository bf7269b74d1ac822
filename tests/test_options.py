"""Options of the command line: flags, YAML, wrong names and values, and TRL's names and defaults."""

import dataclasses
import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")

from option_tools import BASE, parsed

from dpo_fast import DPOConfig
from dpo_fast.cli import options
from dpo_fast.cli.config_file import read_config
from dpo_fast.cli.parse import parse
from dpo_fast.training import config


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
