"""What a GPU refuses before it computes anything, on a stand-in for one (stand_in.py): every op, and steps of training."""

import pytest
import test_op_table
import tiny
import torch
from op_table import OPS
from op_tools import HALF, pairs
from stand_in import cpu_as_gpu, on_device

from dpo_fast import linear_dpo_loss

TABLE = [name for name, op in OPS.items() if op.back_ends]


def moved(x: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor there, with the tensor in it as it lay here."""
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return memory.to("meta").as_strided(x.shape, x.stride(), x.storage_offset())


def test_the_stand_in_refuses_what_a_gpu_refuses(monkeypatch):
    with on_device(monkeypatch):
        x = torch.ones(3, device="meta")
        assert (x * torch.tensor(2.0)).is_meta
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            x[torch.arange(2)]
        for read in (torch.Tensor.item, torch.Tensor.nonzero, torch.Tensor.tolist):
            with pytest.raises(RuntimeError):
                read(x[0])


@pytest.mark.parametrize("name", TABLE)
def test_every_op(name, monkeypatch):
    op = OPS[name]
    for i, row in enumerate(op.rows.values()):
        dtypes = [dtype for dtype in HALF if dtype in row.dtypes]
        for dtype in dtypes[i % 2 :][:1] or dtypes[:1]:
            x = test_op_table.changed(test_op_table.sample(op, row, dtype, True), moved)
            needed = test_op_table.needed(row, x)
            with monkeypatch.context() as patch, on_device(patch) as mode:
                own = test_op_table.options_of(op, row, dtype, "torch on cuda", patch)
                leaves = {k: t.requires_grad_(k in needed) for k, t in x.leaves.items()}
                main, found = test_op_table.outcome(op.function(**leaves, **x.rest, **own))
                assert all(t.is_meta for t in found.values())
                wanted = [leaves[k] for k in needed]
                if main.requires_grad:
                    grads = torch.autograd.grad(main, wanted, torch.ones_like(main), allow_unused=True)
                    for g, t in zip(grads, wanted, strict=True):
                        assert g is None or (g.shape, g.dtype, g.is_meta) == (t.shape, dtype, True)
            assert mode.ops


@pytest.mark.parametrize("name", TABLE)
def test_every_op_with_values(name, monkeypatch):
    """By the rules of the table, on a CPU that takes every branch of a GPU."""
    for row_name, row in OPS[name].rows.items():
        if torch.bfloat16 in row.dtypes:
            with monkeypatch.context() as patch:
                cpu_as_gpu(patch)
                test_op_table.test_op(name, row_name, torch.bfloat16, "torch", patch)


def test_sums_over_chunks_are_products_in_float32(monkeypatch):
    """The gradient of a trained head in bfloat16 takes several products, which a GPU adds up in one call each."""
    hidden, targets, cu = pairs([(0, 3), (0, 4), (0, 1), (0, 2)], 37, packed=True, width=5, dtype=torch.bfloat16)
    leaves = [
        hidden.to("meta").requires_grad_(),
        torch.randn(37, 5, device="meta", dtype=torch.bfloat16, requires_grad=True),
    ]
    with on_device(monkeypatch) as mode:
        linear_dpo_loss(*leaves, targets.to("meta"), cu_seqlens=cu, workspace_bytes=5 * 37 * 2).loss.backward()
    assert mode.ops["addmm"] >= 1
    assert all(x.grad.dtype == x.dtype for x in leaves)


# ---- Steps of training ----


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Makes a trainer on the CPU and moves it: transformers itself knows no such device."""
    pytest.importorskip("transformers")
    from dpo_fast import DPOConfig, DPOTrainer

    def make(model, lora=False, **changes):
        adapters = None
        if lora:
            peft = pytest.importorskip("peft")
            adapters = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        args = DPOConfig(
            output_dir=str(tmp_path / "out"), ref_cache_dir=str(tmp_path / "cache"), use_cpu=True, report_to="none",
            verify=False, optim="adamw_torch", **changes,
        )  # fmt: skip
        trainer = DPOTrainer(model, args=args, train_dataset=tiny.pairs(8), peft_config=adapters)
        trainer._started = True  # the first step alone reads whether policy and reference agree
        trainer.model.to("meta")
        trainer.create_optimizer_and_scheduler(10)
        monkeypatch.setattr(DPOConfig, "device", property(lambda args: torch.device("meta")))
        return trainer

    return make


def qwen2() -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=tiny.VOCABULARY, num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    )


MODELS = {"llama": tiny.llama, "qwen2": qwen2}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_tokens_per_batch": 60, "use_weighting": True},
        {"lora": True, "loss_type": ["sigmoid", "sft"]},
        {"gradient_checkpointing": True},
    ],
    ids=["whole", "split", "lora", "checkpointing"],
)
def test_steps(trainer, monkeypatch, kind, changes):
    """Forward, loss and backward through flash attention, clipping, and the step of the float32 masters."""
    trainer = trainer(MODELS[kind]().to(torch.bfloat16), **{"gradient_checkpointing": False} | changes)
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with on_device(monkeypatch) as mode:
        for _ in range(2):
            loss = trainer.training_step(trainer.model, batch)
            assert (loss.is_meta, loss.shape) == (True, ())
            parameters = [p for p in trainer.model.parameters() if p.requires_grad]
            assert all((p.grad.is_meta, p.grad.shape, p.grad.dtype) == (True, p.shape, p.dtype) for p in parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            trainer.optimizer.step()
            trainer.model.zero_grad()
    layers = trainer.model.config.num_hidden_layers * len(batch["parts"]) * 2
    assert mode.ops["_flash_attention_backward"] == layers
    # Recomputation is one more pass through the trunk, and so is the reference, which is the model without its adapters.
    passes = 1 + ("gradient_checkpointing" in changes) + ("lora" in changes)
    assert mode.ops["_flash_attention_forward"] == passes * layers
