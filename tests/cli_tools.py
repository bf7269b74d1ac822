"""What the tests of the command line share: a tiny model and its tokenizer, pairs of letters, arguments of a short run."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from dpo_fast.train import main  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a{% endif %}"
PAIRS = [{"prompt": f"ab{c}", "chosen": f"{c}de", "rejected": "fgh"} for c in "ijklmnopqr"]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(name="tokenizer", scope="module")
def tokenizer_fixture():
    """A tokenizer with one token per letter."""
    vocabulary = {"<s>": 0, "</s>": 1} | {chr(ord("a") + i): 2 + i for i in range(26)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="z"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


@pytest.fixture(name="model_dir", scope="module")
def model_dir_fixture(tmp_path_factory, tokenizer):
    """A tiny Llama with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder, vocab_size=28)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_llama(folder, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, **changes}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)


@pytest.fixture(name="train_file")
def train_file_fixture(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture(name="arguments")
def arguments_fixture(tmp_path, model_dir, train_file):
    """A run of three steps on the CPU that writes below tmp_path."""
    return [
        *("--model_name_or_path", model_dir, "--dataset_name", train_file, "--output_dir", str(tmp_path / "out")),
        *("--max_steps", "3", "--per_device_train_batch_size", "2", "--use_cpu", "--no_bf16"),
    ]


def failure(argv, capsys) -> str:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("dpo_fast: error: ")
    return error
