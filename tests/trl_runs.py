"""Short runs of a TRL trainer, any version's: a tiny model, rows whose ids are known, what is compared afterwards."""

import datasets
import pytest
import tiny
import torch
import trl
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

STEPS = 20
IGNORED = {"epoch", "step", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


def tokenizer():
    """A tokenizer with one token per word, all words of one width, so that the ids of a text are known."""
    words = Tokenizer(models.WordLevel({f"t{i:02}": i for i in range(tiny.VOCABULARY)}, unk_token="t00"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t00", eos_token="t02", unk_token="t00")


def rows(count=24):
    def text(ids):
        return " ".join(f"t{i:02}" for i in ids)

    return datasets.Dataset.from_list(
        [
            {
                "prompt": text(r["prompt_ids"]),
                "chosen": " " + text(r["chosen_ids"]),
                "rejected": " " + text(r["rejected_ids"]),
            }
            for r in tiny.pairs(count)
        ]
    )


def options(folder, **changes):
    fixed = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "max_steps": STEPS,
        "logging_steps": 1, "optim": "sgd", "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_strategy": "no",
        "disable_tqdm": True, "seed": 3, "gradient_checkpointing": False,
    }  # fmt: skip
    return trl.DPOConfig(**fixed | changes)


def run(folder, trainer_class, model=None, peft=False, **changes):
    torch.manual_seed(0)
    # By name, since TRL loads the reference from where the model came from.
    (model() if model else tiny.llama(dtype=torch.float32)).save_pretrained(folder / "start")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None
    trainer = trainer_class(
        str(folder / "start"),
        args=options(folder, **changes),
        train_dataset=rows(),
        processing_class=tokenizer(),
        peft_config=lora,
    )
    start = trained_weights(trainer)
    trainer.train()
    return trainer.state.log_history, trained_weights(trainer), start


def trained_weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def compare(mine, theirs, tolerance):
    """Logs and trained weights are equal to `tolerance`, and training moved the weights by at least 200 times that."""
    for a, b in zip(mine[0], theirs[0], strict=True):
        # Before the first step policy and reference are equal, and rounding decides which reward is larger.
        equal = {"rewards/accuracies"} if abs(b.get("rewards/margins", 1)) < 1e-5 else set()
        for name in set(b) - IGNORED - equal:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)
    size = theirs[1].abs().max().item()
    moved = (theirs[1] - theirs[2]).abs().max().item()
    assert moved > 200 * tolerance * size, "too little training for a comparison: a gradient 1 % off would pass"
    torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=tolerance * size)
