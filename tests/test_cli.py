"""`python -m dpo_fast.train`: short runs on a tiny model, and what they print. Errors are in test_cli_errors.py."""

import dataclasses
import json
import re
import sys

import forked
import pytest
import torch

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

from cli_tools import (  # noqa: E402, F401 - fixtures
    PAIRS,
    TEMPLATE,
    arguments_fixture,
    failure,
    model_dir_fixture,
    tokenizer_fixture,
    train_file_fixture,
    write,
)

from dpo_fast import DPOConfig  # noqa: E402
from dpo_fast.cli.options import ModelArguments, ScriptArguments  # noqa: E402
from dpo_fast.train import main  # noqa: E402

CHATS = [
    {"prompt": [{"role": "user", "content": "hi"}]}
    | {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "yes"), ("rejected", "no"))}
]


def start(argv, module=("dpo_fast.train",)):
    """The command line in a process of its own."""
    return forked.run(*module, *argv)


def assert_clean(done):
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "Traceback" in line or "Warning" in line], done.stderr


def test_without_arguments_the_demo_runs(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "dpo_fast.demo", SimpleNamespace(main=lambda argv: 7 + len(argv)))
    assert main([]) == 7


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert len(lines) < 200
    assert max(map(len, lines)) <= 120
    listed = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(listed) == len(set(listed))
    assert listed.index("--dataset_name") < listed.index("--beta") < listed.index("--weight_decay")
    not_used, refused = shown.split("Accepted and not used")[1].split("Refused, since")
    for name, where in (("pad_token", not_used), ("neftune_noise_alpha", refused)):
        assert where.count(name) == 1
        assert f"--{name}" not in shown
    known = set(re.findall(r"\w+", shown))
    for cls in (ScriptArguments, ModelArguments, DPOConfig):
        assert {f.name for f in dataclasses.fields(cls) if f.init} <= known


def test_inspect_data_shows_both_splits_of_a_directory(arguments, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train.jsonl", PAIRS[:7])
    write(tmp_path / "data/test.jsonl", PAIRS[7:])
    argv = ["--dataset_name", str(tmp_path / "data"), "--eval_strategy", "epoch", "--inspect_data"]
    assert main([*arguments, *argv]) == 0
    train, evaluation = capsys.readouterr().out.split("#### eval")
    assert "7 pairs to train on" in train
    assert "3 pairs to train on" in evaluation


def test_inspect_data_needs_a_tokenizer_only(tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    file = write(tmp_path / "chats.jsonl", CHATS)
    capsys.readouterr()
    argv = ["--inspect_data", "--model_name_or_path", str(tmp_path / "tokenizer"), "--dataset_name", file, "--use_cpu"]
    assert main([*argv, "--chat_template_path", str(tmp_path / "t.jinja")]) == 0
    shown = capsys.readouterr()
    assert "⟦yes</s>⟧" in shown.out
    assert "prompt, chosen, rejected as messages" in shown.out
    assert "fewer than padded" in shown.out
    assert shown.err == ""


def test_a_run_of_three_steps(arguments, tmp_path):
    """The model learns, is saved and loads again, and the screen shows only the run."""
    cache = ["--ref_cache_dir", str(tmp_path / "cache"), "--learning_rate", "1e-2"]
    done = start([*arguments, *cache, "--eval_strategy", "steps", "--eval_steps", "2", "--test_split_size", "0.3"])
    assert_clean(done)
    lines = done.stdout.splitlines()
    assert f"saved the model and its tokenizer to {tmp_path / 'out'}" in lines
    assert "held out: 3 pairs, 7 are left to train on" in lines
    assert lines[-1].startswith("held-out reward accuracy 100.0%, margin 0.000 -> "), lines[-1]
    for part in ("margin 0.000 -> ", "step 3 reached in ", " pairs/s", " of packed tokens saved"):
        assert part in lines[-1]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = transformers.AutoModelForCausalLM.from_pretrained(arguments[1])
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"


@pytest.mark.slow
def test_a_yaml_file_of_trl_trains_adapters(tmp_path, model_dir, train_file, capsys):
    """The keys that a `trl dpo` file usually has, in bf16, and a resumed second run of it."""
    file = tmp_path / "dpo.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": model_dir, "dataset_name": train_file, "test_split_size": 0.3,
                "learning_rate": "5.0e-6", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                "bf16": True, "loss_type": "sigmoid", "beta": 0.1, "max_length": 512, "eval_strategy": "steps",
                "eval_steps": 2, "use_peft": True, "lora_r": 4, "report_to": "none", "gradient_checkpointing": True,
                "output_dir": str(tmp_path / "out"), "dtype": "bfloat16", "max_steps": 2, "save_steps": 2,
            }
        )
    )  # fmt: skip
    assert_clean(start(["--config", str(file)]))
    adapters = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (adapters["r"], adapters["lora_alpha"]) == (4, 32)
    more = ["--resume_from_checkpoint", "true", "--max_steps", "4"]
    capsys.readouterr()
    assert "max_steps was 2, is 4" in failure(["--config", str(file), *more], capsys)
    assert main(["--config", str(file), *more, "--resume_changed", "max_steps"]) == 0
    again = capsys.readouterr()
    assert "step 4 reached in" in again.out
    assert "Warning" not in again.err
    assert (tmp_path / "out/checkpoint-4/complete.json").exists()


@pytest.mark.slow
def test_two_processes_print_once(arguments, tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dpo_fast.train"]
    extra = ["--ddp_backend", "gloo", "--ref_cache_dir", str(tmp_path / "cache"), "--ignore_bias_buffers"]
    done = start([*arguments, *extra, "--max_length", "5"], module=launcher)
    assert_clean(done)
    assert done.stdout.count("saved the model") == 1
    assert done.stdout.count("10 pairs, layout") == 1
    assert done.stderr.count("10 of 10 pairs have a completion cut at max_length=5") == 1


def test_warnings_of_dpo_fast_are_one_line_each(arguments, tmp_path, capsys):
    argv = [*arguments, "--ref_cache_dir", str(tmp_path / "cache"), "--max_steps", "1", "--max_length", "5"]
    assert main(argv) == 0
    warning = "dpo_fast: train data: 10 of 10 pairs have a completion cut at max_length=5\n"
    assert capsys.readouterr().err == warning


@pytest.mark.parametrize("asked", ["sdpa", "eager", "flash_attention_2"])
def test_an_attention_of_trl_is_accepted_and_the_log_names_what_runs(arguments, tmp_path, asked, capsys):
    argv = [*arguments, "--ref_cache_dir", str(tmp_path / "cache"), "--max_steps", "1"]
    assert main([*argv, "--attn_implementation", asked]) == 0
    shown = capsys.readouterr()
    line = (
        f"attention: dpo_fast's own, exact over shared prompts (attn_implementation={asked} was asked for; the numbers"
    )
    assert line in shown.err
    assert len(shown.err.splitlines()) == 1


def test_the_workspace_reaches_the_head(arguments, tmp_path, monkeypatch):
    """Where no logit may be kept, the rows past the workspace are all rows: same model, other path."""
    from dpo_fast.ops import tiles

    seen, weights = [], []
    real = tiles.workspace_rows
    monkeypatch.setattr("dpo_fast.ops.head.workspace_rows", lambda w, limit: seen.append(limit) or real(w, limit))
    for limit in ("0", "1000000"):
        argv = [*arguments, "--ref_cache_dir", str(tmp_path / "cache"), "--max_steps", "2", "--learning_rate", "1e-2"]
        assert main([*argv, "--workspace_bytes", limit, "--output_dir", str(tmp_path / limit)]) == 0
        assert {int(limit)} == set(seen)
        seen.clear()
        weights.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / limit).lm_head.weight)
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


def test_the_back_end_reaches_the_head(arguments, tmp_path, recorded):
    argv = [*arguments, "--ref_cache_dir", str(tmp_path / "cache"), "--max_steps", "1"]
    assert main(argv) == 0
    assert not recorded
    assert main([*argv, "--backend", "recorded"]) == 0
    assert "residual_" in recorded


def test_in_one_process_only_the_run_is_printed(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert main([*arguments, "--ref_cache_dir", str(tmp_path / "cache"), "--max_steps", "1"]) == 0
    shown = capsys.readouterr()
    assert "pairs/s" in shown.out.splitlines()[-1]
    assert "held-out" not in shown.out
    assert shown.err == ""


def test_streamed_files_train_as_the_same_rows_in_memory(arguments, tmp_path, capsys, monkeypatch):
    """Of two files, one after the other, in their order; a row that is left out is named; no cache is written."""
    from datasets import config

    bad = {**PAIRS[0], "rejected": ""}
    files = [write(tmp_path / "a.jsonl", [*PAIRS[:4], bad]), write(tmp_path / "b.jsonl", PAIRS[4:])]
    kept = tmp_path / "kept"
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", kept)
    common = [*arguments, "--dataset_name", *files, "--skip_bad_rows", "--learning_rate", "1e-2"]
    assert main([*common, "--streaming", "--output_dir", str(tmp_path / "streamed")]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"dpo_fast: {files[0]} line 5 is left out, and maybe others: 'rejected' is empty\n"
    assert f"streamed, in the order of the rows: {files[0]}, {files[1]}" in shown.out
    assert not list(kept.glob("dpo_fast/*"))
    plain = ["--train_sampling_strategy", "sequential", "--no_precompute_ref_log_probs"]
    assert main([*common, *plain, "--output_dir", str(tmp_path / "plain")]) == 0
    assert list(kept.glob("dpo_fast/*"))
    got, want = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("streamed", "plain"))
    assert got == want
