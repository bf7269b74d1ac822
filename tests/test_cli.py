"""`python -m dpo_fast.train`: errors in one line, and short runs on a tiny model. Options are in test_options.py."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
yaml = pytest.importorskip("yaml")

from dpo_fast import DPOConfig  # noqa: E402
from dpo_fast.cli.options import ModelArguments, ScriptArguments  # noqa: E402
from dpo_fast.train import main  # noqa: E402
from dpo_fast.training import run_setup as setup_run  # noqa: E402

ROOT = Path(__file__).parents[1]
TEMPLATE = "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a{% endif %}"
PAIRS = [{"prompt": f"ab{c}", "chosen": f"{c}de", "rejected": "fgh"} for c in "ijklmnopqr"]
CHATS = [
    {"prompt": [{"role": "user", "content": "hi"}]}
    | {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "yes"), ("rejected", "no"))}
]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with one token per letter."""
    vocabulary = {"<s>": 0, "</s>": 1} | {chr(ord("a") + i): 2 + i for i in range(26)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="z"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tokenizer):
    """A tiny Llama with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder, vocab_size=28)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_llama(folder, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, **changes}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)


@pytest.fixture
def train_file(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def arguments(tmp_path, model_dir, train_file):
    """A run of three steps on the CPU that writes below tmp_path."""
    return [
        *("--model_name_or_path", model_dir, "--dataset_name", train_file, "--output_dir", str(tmp_path / "out")),
        *("--max_steps", "3", "--per_device_train_batch_size", "2", "--use_cpu", "--no_bf16"),
    ]


# Errors: one line, status 2, and before the model is loaded.


def failure(argv, capsys) -> str:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("dpo_fast: error: ")
    return error


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


def test_other_missing_modules_are_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "dpo_fast.demo", None)
    with pytest.raises(ModuleNotFoundError):
        main([])


def test_without_arguments_the_demo_runs(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "dpo_fast.demo", SimpleNamespace(main=lambda argv: 7 + len(argv)))
    assert main([]) == 7


# Runs.


def start(argv, module=("dpo_fast.train",)):
    """The command line in a process of its own."""
    return forked.run(*module, *argv)


def assert_clean(done):
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "Traceback" in line or "Warning" in line], done.stderr


def test_without_transformers_it_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None; sys.argv = ['train', '--beta', '1'];"
        "import runpy; runpy.run_module('dpo_fast.train', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "dpo_fast: error: transformers is not installed: pip install 'dpo_fast[train]'\n"


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


def test_model_init_kwargs_that_the_model_does_not_take_are_an_error(arguments, capsys):
    assert "model_init_kwargs do not fit the model" in failure(
        [*arguments, "--model_init_kwargs", '{"foo": 1}'], capsys
    )


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


def test_streamed_files_train_as_the_same_rows_in_memory(arguments, tmp_path, capsys):
    """Of two files, one after the other, in their order; a row that is left out is named; no cache is written."""
    from datasets import config

    bad = {**PAIRS[0], "rejected": ""}
    files = [write(tmp_path / "a.jsonl", [*PAIRS[:4], bad]), write(tmp_path / "b.jsonl", PAIRS[4:])]
    cached = len(list(Path(config.HF_DATASETS_CACHE).glob("dpo_fast/*")))
    common = [*arguments, "--dataset_name", *files, "--skip_bad_rows", "--learning_rate", "1e-2"]
    assert main([*common, "--streaming", "--output_dir", str(tmp_path / "streamed")]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"dpo_fast: {files[0]} line 5 is left out, and maybe others: 'rejected' is empty\n"
    assert f"streamed, in the order of the rows: {files[0]}, {files[1]}" in shown.out
    assert len(list(Path(config.HF_DATASETS_CACHE).glob("dpo_fast/*"))) == cached
    plain = ["--train_sampling_strategy", "sequential", "--no_precompute_ref_log_probs"]
    assert main([*common, *plain, "--output_dir", str(tmp_path / "plain")]) == 0
    got, want = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("streamed", "plain"))
    assert got == want


def test_in_one_process_only_the_run_is_printed(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert main([*arguments, "--ref_cache_dir", str(tmp_path / "cache"), "--max_steps", "1"]) == 0
    shown = capsys.readouterr()
    assert "pairs/s" in shown.out.splitlines()[-1]
    assert "held-out" not in shown.out
    assert shown.err == ""
