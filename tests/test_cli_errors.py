"""`python -m dpo_fast.train`: what is wrong ends as one line with status 2, before the model is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("yaml")

from cli_tools import (  # noqa: F401 - fixtures
    TEMPLATE,
    arguments_fixture,
    failure,
    model_dir_fixture,
    save_llama,
    tokenizer_fixture,
    train_file_fixture,
)

from dpo_fast.train import main
from dpo_fast.training import run_setup as setup_run


@pytest.fixture
def no_loading(monkeypatch):
    def load_model(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(setup_run, "load_model", load_model)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--lr", "1"], "unknown option --lr"),
        (["--max_steps"], "--max_steps"),
        (["--config", "no.yaml"], "No such file or directory: no.yaml"),
        (["--dataset_name", "no/such/file.jsonl"], "no such file or directory: no/such/file.jsonl"),
        (["--eval_strategy", "epoch", "--eval_dataset_name", "./no"], "no such file or directory: ./no"),
        (["--eval_strategy", "epoch"], "has no split 'test'"),
        (["--model_name_or_path", "./no"], "no such model folder: ./no"),
        (["--chat_template_path", "no.jinja"], "no such file: no.jinja"),
        (["--model_revision", "v2"], "model_revision has no effect"),
        (["--resume_from_checkpoint", "True"], "no whole checkpoint"),
        (["--resume_from_checkpoint", "no"], "no has no complete.json"),
        (["--ranking_pairs", "best_worst"], "ranking_pairs=best_worst has no effect"),
        (["--use_peft", "--lora_target_modules", "nope"], "the model has no module nope"),
        (["--use_peft", "--lora_target_modules", "q_proj", "nope"], "the model has no module nope"),
        (["--use_peft", "--lora_target_modules", "q_proj)("], "is not a valid pattern"),
        (["--use_peft", "--lora_target_modules", "lm_head", "--use_dora"], "leave lm_head out"),
        (["--use_peft", "--sync_ref_model"], "sync_ref_model"),
        (["--report_to", "nothing_known"], "nothing_known"),
        (["--max_length", "3"], "no pair is left of 10 rows"),
        (["--loss_type", "sigmod"], "sigmod"),
        (["--streaming", "--max_steps", "-1"], "nobody knows where an epoch ends: set max_steps"),
        (["--dataset_streaming", "--precompute_ref_log_probs"], "precompute_ref_log_probs is not supported with Itera"),
        (["--streaming", "--dataset_weights", "2"], "dataset_weights and streaming exclude each other"),
        (
            ["--streaming", "--eval_strategy", "epoch", "--test_split_size", "2"],
            "test_split_size and streaming exclude",
        ),
        (["--streaming", "--inspect_data"], "inspect_data and streaming exclude each other"),
        (
            ["--streaming", "--max_length", "3"],
            "no usable pair in the train data, which is streamed; the first row left",
        ),
    ],
)
def test_errors_end_as_one_line(arguments, changes, message, capsys):
    assert message in failure([*arguments, *changes], capsys)


@pytest.mark.usefixtures("no_loading")
def test_a_missing_back_end_is_an_error(arguments, tmp_path, missing, capsys):
    assert failure([*arguments, "--backend", "missing"], capsys) == f"dpo_fast: error: {missing}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n', "pairs.jsonl line 2: the line is not valid"),
        ('{"question": "a", "chosen": "b"}\n', "no known layout has these columns: question, chosen"),
        ('{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}\n', "no chat template"),
        ("", "no pair to train on"),
    ],
)
def test_data_errors_end_as_one_line(arguments, train_file, text, message, capsys):
    Path(train_file).write_text(text)
    assert message in failure(arguments, capsys)
    if text:
        assert message in failure([*arguments, "--streaming"], capsys)


@pytest.mark.usefixtures("no_loading")
def test_a_template_without_effect_is_an_error(arguments, tmp_path, capsys):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    given = ["--chat_template_path", str(tmp_path / "t.jinja")]
    assert "chat_template_path has no effect" in failure([*arguments, "--streaming", *given], capsys)
    error = failure([*arguments, *given], capsys)
    assert "chat_template_path has no effect" in error


@pytest.mark.usefixtures("no_loading")
def test_a_tokenizer_larger_than_the_model_is_an_error(arguments, tmp_path, tokenizer, capsys):
    save_llama(tmp_path / "small", vocab_size=6)
    tokenizer.save_pretrained(tmp_path / "small")
    capsys.readouterr()
    error = failure([*arguments, "--model_name_or_path", str(tmp_path / "small")], capsys)
    assert "the model knows ids below 6 and the tokenizer holds 28" in error


@pytest.mark.usefixtures("no_loading")
def test_a_folder_without_tokenizer_is_an_error(arguments, tmp_path, capsys):
    save_llama(tmp_path / "bare", vocab_size=28)
    capsys.readouterr()
    assert "bare" in failure([*arguments, "--model_name_or_path", str(tmp_path / "bare")], capsys)


def test_weights_that_are_missing_are_an_error(arguments, tmp_path, tokenizer, capsys):
    from safetensors.torch import load_file, save_file

    save_llama(tmp_path / "torn", vocab_size=28)
    tokenizer.save_pretrained(tmp_path / "torn")
    file = tmp_path / "torn/model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    capsys.readouterr()
    error = failure([*arguments, "--model_name_or_path", str(tmp_path / "torn")], capsys)
    assert "lacks the weights lm_head.weight" in error


@pytest.mark.usefixtures("no_loading")
def test_a_missing_extra_says_what_to_install(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "peft is not installed: pip install 'dpo_fast[train]'" in failure([*arguments, "--use_peft"], capsys)


def test_a_full_device_says_what_to_lower(arguments, monkeypatch, capsys):
    def load_model(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(setup_run, "load_model", load_model)
    assert "out of memory: set max_tokens_per_batch" in failure(arguments, capsys)


def test_model_init_kwargs_that_the_model_does_not_take_are_an_error(arguments, capsys):
    assert "model_init_kwargs do not fit the model" in failure(
        [*arguments, "--model_init_kwargs", '{"foo": 1}'], capsys
    )


def test_other_missing_modules_are_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "dpo_fast.demo", None)
    with pytest.raises(ModuleNotFoundError):
        main([])


def test_without_transformers_it_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None; sys.argv = ['train', '--beta', '1'];"
        "import runpy; runpy.run_module('dpo_fast.train', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr == "dpo_fast: error: transformers is not installed: pip install 'dpo_fast[train]'\n"
