"""`torch_compile`: the parts of the decoder layers are compiled, and neither numbers nor names change.

Most tests take the backend "aot_eager": all of torch.compile but its code generator, which costs half a minute.
"""

import copy
import logging

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from model_families import VOCAB, build
from peft import LoraConfig, get_peft_model

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.forest.model import prepare_model, restore_model
from dpo_fast.forest.packing import PrefixForest
from dpo_fast.training import compiling
from dpo_fast.training.compiling import compile_layers

counters = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def fresh():
    """No compilation is left of another test, and a part that is compiled too often is an error instead of eager code."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def config(folder, **changes) -> DPOConfig:
    return DPOConfig(
        **{
            "output_dir": str(folder / "out"), "ref_cache_dir": str(folder / "cache"), "use_cpu": True, "bf16": False,
            "report_to": "none", "optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "logging_steps": 1,
            "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, **changes,
        }
    )  # fmt: skip


def run(model, forest: PrefixForest) -> list[torch.Tensor]:
    """Log-probs of the forest's tokens, and the gradients of all weights of a sum in which each token weighs its own."""
    model.zero_grad()
    logps = model(forest=forest)["token_logps"]
    (logps * torch.arange(1, logps.numel() + 1)).sum().backward()
    return [logps.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "lora", "checkpointing"),
    [
        ("llama", False, False),
        ("llama", True, True),
        ("gemma2", False, True),  # two kinds of layers
        ("qwen3_moe", False, False),  # branches on data
        ("llama4_text", False, False),  # padded
    ],
)
def test_numbers_and_graphs(family, lora, checkpointing, tmp_path):
    """Log-probs and gradients are the model's own, and forests of other shapes add no graph."""
    plain = build(family)
    if lora:
        plain = get_peft_model(
            plain, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        ).double()
    compiled = copy.deepcopy(plain)
    share = "prefix" if prepare_model(plain).share else "none"
    prepare_model(compiled)
    names = list(compiled.state_dict())
    compile_layers(compiled, config(tmp_path, torch_compile_backend="aot_eager"))
    assert list(compiled.state_dict()) == names
    if checkpointing:
        compiled.train().gradient_checkpointing_enable({"use_reentrant": False})
    graphs = []
    for seed in range(4):
        rows = [{k: [i % VOCAB for i in ids] for k, ids in row.items()} for row in tiny.pairs(2 + seed, seed)]
        forest = PrefixForest.from_pairs(rows, share=share)
        for one, two in zip(run(plain, forest), run(compiled, forest), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1]


@pytest.mark.slow
def test_the_code_that_torch_makes(tmp_path):
    """By default inductor compiles. In half precision a compiled layer is as near to float64 as the model's own."""
    plain = build("llama", dtype=torch.bfloat16)
    compiled, exact = copy.deepcopy(plain), build("llama")
    for model in (plain, compiled, exact):
        prepare_model(model)
    compile_layers(compiled, config(tmp_path, torch_compile=True))
    forest = PrefixForest.from_pairs(tiny.pairs(4))
    found, own, truth = run(compiled, forest), run(plain, forest), run(exact, forest)
    assert counters["stats"]["unique_graphs"] > 0
    logps, gradients = slice(1), slice(1, None)
    for part in (logps, gradients):
        one, two, true = (torch.cat([x.double().flatten() for x in values[part]]) for values in (found, own, truth))
        assert (one - true).norm() <= 2 * (two - true).norm()


@pytest.mark.slow
def test_a_run(tmp_path):
    """The same losses and weights, and a first margin of zero; accelerate, which would compile the whole, compiles nothing."""
    found = {}
    for on in (False, True):
        changes = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if on else {}
        args = config(tmp_path, eval_strategy="steps", eval_steps=2, **changes)
        data = {"train_dataset": tiny.pairs(8), "eval_dataset": tiny.pairs(3, 1)}
        trainer = DPOTrainer(tiny.llama(), args=args, **data)
        assert trainer.accelerator.state.dynamo_plugin.backend.value == "NO"
        before = counters["stats"]["unique_graphs"]
        trainer.train()
        found[on] = trainer
        assert (counters["stats"]["unique_graphs"] > before) == on
    (plain, compiled), steps = (found[on].state.log_history for on in (False, True)), 0
    for one, two in zip(plain, compiled, strict=True):
        for name in ("loss", "eval_loss", "rewards/margins", "grad_norm"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-6, abs=1e-9)
                steps += name == "loss"
    assert steps == 3
    assert compiled[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    weights = [found[on].model.state_dict() for on in (False, True)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-6, atol=1e-9)
    assert found[True].args.torch_compile
    assert found[True].args.to_dict()["torch_compile_backend"] == "aot_eager"


@pytest.mark.slow
def test_a_reference_of_its_own_is_compiled_too(tmp_path):
    args = config(tmp_path, torch_compile_backend="eager", precompute_ref_log_probs=False, max_steps=1)
    trainer = DPOTrainer(tiny.llama(), args=args, train_dataset=tiny.pairs(4))
    assert trainer.ref_model.model.layers[1].mlp._compiled_call_impl is not None
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0


def test_another_run_of_the_same_model_is_not_compiled(tmp_path):
    model = tiny.llama()
    for options in ({"torch_compile_backend": "eager"}, {}):
        DPOTrainer(model, args=config(tmp_path, **options), train_dataset=tiny.pairs(4))
        assert (model.model.layers[0].mlp._compiled_call_impl is not None) == bool(options)


def test_what_was_kept_by_a_run_without_it_is_not_taken(tmp_path):
    """Roundings differ: neither the cache of the reference nor a checkpoint passes from one to the other in silence."""
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    DPOTrainer(tiny.llama(), args=config(tmp_path, **changes), train_dataset=tiny.pairs(4)).train()
    args = config(tmp_path, torch_compile_backend="eager", **changes)
    trainer = DPOTrainer(tiny.llama(), args=args, train_dataset=tiny.pairs(4))
    assert len(list((tmp_path / "cache").glob("ref-*.bin"))) == 2
    with pytest.raises(ValueError, match="torch_compile was None, is eager/default"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("backend", "mode", "why"),
    [
        ("no_such", None, "Invalid backend"),
        (None, "no such", "Unrecognized mode"),
        (None, "reduce-overhead", "max-autotune-no-cudagraphs"),
        (None, "max-autotune", "max-autotune-no-cudagraphs"),
        ("cudagraphs", None, "max-autotune-no-cudagraphs"),
        ("aot_eager", "max-autotune-no-cudagraphs", "only the backend inductor has modes"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, backend, mode, why):
    with pytest.raises(ValueError, match=f"torch_compile_backend={backend!r}.*{why}") as caught:
        config(tmp_path, torch_compile_backend=backend, torch_compile_mode=mode)
    assert "\n" not in str(caught.value)


def test_what_is_asked_for(tmp_path):
    asked = config(tmp_path, torch_compile_mode="max-autotune-no-cudagraphs")
    assert compiling.described(asked) == "inductor/max-autotune-no-cudagraphs"
    for off in (False, None):
        assert compiling.described(config(tmp_path, torch_compile=off)) is None
    again = DPOConfig(**{k: v for k, v in asked.to_dict().items() if k in ("output_dir", "use_cpu", *compiling.OFF)})
    assert compiling.described(again) == compiling.described(asked)


def test_liger_beside_it_is_refused(tmp_path, monkeypatch):
    from dpo_fast.training import unused

    monkeypatch.setattr(unused, "_has_gpu", lambda values: True)
    with pytest.raises(ValueError, match="give one of them"):
        config(tmp_path, torch_compile=True, use_liger_kernel=True)


def test_accelerates_own_option_is_named(tmp_path, monkeypatch, caplog):
    """`accelerate launch --dynamo_backend inductor` sets this variable."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    DPOTrainer(tiny.llama(), args=config(tmp_path), train_dataset=tiny.pairs(4))
    assert "ACCELERATE_DYNAMO_BACKEND=INDUCTOR is not used: give torch_compile" in caplog.text


@pytest.mark.slow
def test_generating_costs_no_graph(tmp_path):
    """The cache of each layer is another object; the ordinary call runs uncompiled, and training stays compiled."""
    model = tiny.llama(num_hidden_layers=10)
    prepare_model(model)
    compile_layers(model, config(tmp_path, torch_compile_backend="eager"))
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert not counters["stats"]["unique_graphs"]
    run(model, PrefixForest.from_pairs(tiny.pairs(3)))
    assert counters["stats"]["unique_graphs"] == 4
    restore_model(model)
    assert model.model.layers[0].mlp._compiled_call_impl is None


def test_float32_stays_float32(tmp_path, monkeypatch):
    """transformers switches TF32 on with torch_compile."""
    from transformers import training_args

    monkeypatch.setattr(training_args, "enable_tf32", lambda enable: pytest.fail("TF32 is set"))
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    assert config(tmp_path, torch_compile=True).torch_compile


def test_a_model_without_such_layers(tmp_path, caplog):
    model = torch.nn.Module()
    model.forward = torch.nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        compile_layers(model, config(tmp_path, torch_compile=True))
    assert "torch_compile has no effect: Module has no decoder layers" in caplog.text
