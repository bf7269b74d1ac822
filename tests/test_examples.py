"""Every example runs as its first lines say, on a tiny model, and is short."""

import importlib.util
import json
from pathlib import Path

import forked
import pytest
import tiny
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SHORT = (
    "plain_loop.py",
    "trl_trainer.py",
    "trl_patched.py",
    "liger_loss.py",
    "lightning_module.py",
    "cross_entropy.py",
    "llamafactory_patched.py",
)


def run(name, *arguments, cwd):
    environment = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = forked.run(EXAMPLES / name, *arguments, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def model_and_pairs(tmp_path):
    """A byte-level Llama with its tokenizer, and six pairs of text."""
    from dpo_fast.demo.questions import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = tiny.llama(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=512)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i} plus 1 is ", "chosen": f"{i + 1}.", "rejected": "no idea."} for i in range(6)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "model", pairs


@pytest.mark.parametrize("name", SHORT)
def test_at_most_thirty_lines_of_code(name):
    lines = [line for line in (EXAMPLES / name).read_text().splitlines() if line.strip()]
    assert len(lines) <= 30


@pytest.mark.slow
def test_plain_loop(tmp_path):
    lines = run("plain_loop.py", cwd=tmp_path).splitlines()
    losses = [float(line.split()[3]) for line in lines]
    assert losses[-1] < losses[0] < 0.7


@pytest.mark.slow
def test_liger_loss(tmp_path):
    assert run("liger_loss.py", cwd=tmp_path).startswith("loss 0.6931")


def test_cross_entropy(tmp_path):
    words = run("cross_entropy.py", cwd=tmp_path).replace(",", "").split()
    assert words[1] == words[5]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trl_trainer.py", "trl_patched.py"])
def test_trl(name, model_and_pairs, tmp_path):
    if name == "trl_patched.py":
        pytest.importorskip("trl", minversion="1.16", reason="pip install trl==1.16.0")
    run(name, *model_and_pairs, 2, cwd=tmp_path)


def test_lightning_step():
    spec = importlib.util.spec_from_file_location("lightning_module", EXAMPLES / "lightning_module.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = tiny.llama()
    ids = torch.randint(3, tiny.VOCABULARY, (4, 7))
    targets = ids.roll(-1, dims=1)
    targets[:, :2], targets[:, -1] = -100, -100
    tokens = net(input_ids=ids).logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    ref = (tokens * (targets != -100)).sum(1).detach() + torch.tensor([1.0, 0.0, 0.0, 2.0])
    loss = module.DPO(net).training_step({"ids": ids, "targets": targets, "ref_logps": ref}, 0)
    want = -torch.nn.functional.logsigmoid(0.1 * torch.tensor([-1.0, 2.0], dtype=torch.float64)).mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["axolotl.yaml", "torchtune_recipe.yaml"])
def test_yaml_names_what_exists(name):
    import yaml

    config = yaml.safe_load((EXAMPLES / name).read_text())
    path = config["plugins"][0] if "plugins" in config else config["loss"].pop("_component_")
    module, _, attribute = path.rpartition(".")
    source = ROOT / (module.replace(".", "/") + ".py")
    assert f"class {attribute}(" in source.read_text()
    if "loss" in config:
        from dpo_fast.integrations.torchtune import DPOLoss

        DPOLoss(**config["loss"])
