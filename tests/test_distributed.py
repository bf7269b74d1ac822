"""Two gloo processes give the losses, metrics and weights of one process with the same global batch."""

import json

import pytest
import torch

pytest.importorskip("transformers")

import forked
import tiny
from peft import LoraConfig, get_peft_model
from test_resume import TRAINING, history, options
from transformers import MixtralConfig, MixtralForCausalLM

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.data.examples import Examples
from dpo_fast.training.token_batches import TokenBatches
from dpo_fast.training.unused_weights import may_stay_unused

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
RUNS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "split": {"max_tokens_per_batch": 60},
    "fsdp2": {**FSDP, "gradient_checkpointing": False},
    "fsdp2_split": {**FSDP, "max_tokens_per_batch": 60, "gradient_checkpointing": True},
    "fsdp2_compiled": {**FSDP, "gradient_checkpointing": True, "torch_compile_backend": "aot_eager"},
}
LOSS = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}


def sometimes_alike(count: int) -> list[dict]:
    """Every fifth pair begins with 70 common tokens, enough to be left out: often on one rank and not on the other."""
    rows = tiny.pairs(count)
    for row in rows[::5]:
        start = [3 + i % 50 for i in range(70)]
        row["chosen_ids"], row["rejected_ids"] = start + row["chosen_ids"], start + row["rejected_ids"]
    return rows


MARGIN = {"train": sometimes_alike(16), "loss_type": ["sigmoid"], "loss_weights": None}


def spec(folder, name: str, processes: int, train=None, **changes) -> str:
    """The file that says what is run."""
    defaults = {
        "save_strategy": "no", "max_steps": 4, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 2,
        "per_device_train_batch_size": 8 // processes,
    }  # fmt: skip
    names = ("measure", "evaluate_first", "lora", "dtype", "resume", "streamed", "vision", "model", "quantised")
    extra = {key: changes.pop(key) for key in names if key in changes}
    rows = options(folder / f"{name}_run", **{**defaults, **LOSS, **changes})
    # 16 pairs are two steps per epoch (accelerate fills an uneven last step up with pairs of the first). The ranks cannot
    # share the seven pairs for evaluation evenly. A loss that counts tokens needs the global count.
    content = {
        "model": str(folder / "model"), "train": train or tiny.pairs(16), "eval": tiny.pairs(7, seed=5),
        "out": str(folder / name), "options": rows, **extra,
    }  # fmt: skip
    path = folder / f"{name}.spec"
    path.write_text(json.dumps(content))
    return str(path)


def start(processes: int, *specs: str) -> None:
    """The runs of `specs` one after the other, in as many processes."""
    if processes > 1:
        forked.run_ranks(processes, TRAINING, *specs, timeout=400)
        return
    done = forked.run(TRAINING, *specs, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


# Which runs share their processes: a launch costs more than a run.
TOGETHER = {name: name.startswith("fsdp") for name in RUNS}
MARGIN_RUNS = {
    name: {**MARGIN, **RUNS[name], **({"max_tokens_per_batch": 130} if "split" in name else {})}
    for name in ("plain", "fsdp2", "fsdp2_split")
}


TOKENS = 110  # of a batch


def others(folder, processes: int) -> list[str]:
    """Specs of runs that need not be sharded: batches filled to a budget, a stream, and weights that no step uses."""
    halves = 2 // processes
    tokens = {"tokens_per_step": 2 * TOKENS, "gradient_accumulation_steps": halves, "per_device_train_batch_size": 8}
    runs = {
        "tokens": tokens,
        "stream": {"streamed": True, "max_length": 100},
        "vision": {"vision": True, "model": str(folder / "vision")},
    }
    return [spec(folder, f"{name}_{processes}", processes, max_steps=2, **changes) for name, changes in runs.items()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    tiny.llama().save_pretrained(folder / "model")
    tiny.llava().save_pretrained(folder / "vision")
    start(1, spec(folder, "one", 1), spec(folder, "margin_one", 1, **MARGIN), *others(folder, 1))
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["ddp", "fsdp"])
def two_processes(request, one_process):
    names = [name for name, sharded in TOGETHER.items() if sharded == request.param]
    specs = [spec(one_process, name, 2, **RUNS[name]) for name in names]
    specs += [spec(one_process, f"margin_{n}", 2, **changes) for n, changes in MARGIN_RUNS.items() if n in names]
    start(2, *specs, *([] if request.param else others(one_process, 2)))
    return one_process, names


@pytest.mark.slow
def test_two_processes_are_one(two_processes):
    """Losses, metrics and weights; then of a margin loss, of whose pairs what cancels is left out."""
    folder, names = two_processes
    for name in names:
        same(folder, name, "one")
    for name in MARGIN_RUNS.keys() & set(names):
        same(folder, f"margin_{name}", "margin_one")
    if "plain" in names:
        for name in ("tokens", "stream", "vision"):
            same(folder, f"{name}_2", f"{name}_1")


def test_the_batches_of_a_budget_are_unequal_and_dealt_out_evenly():
    """Else one process that takes two of them in a step would not be two that take one each."""
    sizes = [len(batch) for batch in TokenBatches(Examples.of(tiny.pairs(16)), "prefix", TOKENS, seed=42)]
    assert len(sizes) % 2 == 0
    assert len(set(sizes)) > 1


def test_weights_that_a_step_may_leave_out(tmp_path):
    """Experts that are modules of their own and a vision tower, where they are trained; what the user says wins."""
    assert not may_stay_unused(tiny.llama())
    assert may_stay_unused(tiny.llava())
    adapters = LoraConfig(target_modules=r".*language_model.*q_proj")
    assert not may_stay_unused(get_peft_model(tiny.llava(), adapters))
    assert may_stay_unused(get_peft_model(tiny.llava(), LoraConfig(target_modules=["q_proj"])))
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    moe = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4))
    assert not may_stay_unused(moe)
    moe.model.layers[0].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
    assert may_stay_unused(moe)
    moe.model.layers[0].mlp.experts.requires_grad_(False)
    assert not may_stay_unused(moe)
    for given, used in ((None, True), (False, False)):
        args = DPOConfig(**options(tmp_path, ddp_find_unused_parameters=given))
        trainer = DPOTrainer(tiny.llava(), args=args, train_dataset=tiny.pairs(4))
        assert trainer.args.ddp_find_unused_parameters is used
        assert args.ddp_find_unused_parameters is given


def test_tensor_parallel_weights_are_refused(tmp_path):
    """By name, before they are read; and a model that is split already."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    args = DPOConfig(**options(tmp_path / "run", model_init_kwargs={"tp_plan": "auto"}))
    with pytest.raises(ValueError, match=r"^tp_plan: .*tensor parallelism.* leave it out; .*set fsdp=true"):
        DPOTrainer(str(tmp_path / "none"), args=args, train_dataset=tiny.pairs(4))
    model, args = tiny.llama(), DPOConfig(**options(tmp_path / "run"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        weight = distribute_tensor(model.lm_head.weight.data, init_device_mesh("cpu", (1,)), [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(weight)
        for given in ((model,), (tiny.llama(), model)):
            with pytest.raises(ValueError, match=r"^lm_head.weight: "):
                DPOTrainer(*given, args=args, train_dataset=tiny.pairs(4))
    finally:
        torch.distributed.destroy_process_group()


def same(one_process, name: str, wanted: str) -> None:
    for got, want in zip(history(one_process, name), history(one_process, wanted), strict=True):
        assert got.keys() == want.keys()
        for key, value in want.items():
            if key.endswith("rewards/accuracies") and got["step"] <= 1:
                continue  # policy and reference are equal: the sign of a rounding error
            assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, key)
    evaluations = [json.loads((one_process / n).read_text())["eval"] for n in (name, wanted)]
    for key, value in evaluations[1].items():
        if not key.endswith(("runtime", "per_second", "preparation_time")):
            assert evaluations[0][key] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, key)
    got, want = (torch.load(one_process / f"{n}.pt", weights_only=True) for n in (name, wanted))
    start_weights = dict(tiny.llama().named_parameters())
    for key in want:
        moved = (want[key] - start_weights[key]).norm() if key in start_weights else 1.0
        assert (got[key] - want[key]).norm() <= 1e-5 * moved, (name, key)
