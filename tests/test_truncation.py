"""max_length with keep_start and keep_end: the sequences of TRL's collator, and their log-probs by the model's own forward."""

import random

import pytest
import torch

pytest.importorskip("transformers")

import tiny

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.data.tokens import truncate
from dpo_fast.forest import packing
from dpo_fast.training.ref_cache import RefCache

MODES = ("keep_start", "keep_end")


def rows(count: int = 40) -> list[dict]:
    """Pairs whose sides end at, before and after the limit, alone and with the prompt; some repeat one token."""
    rng = random.Random(3)
    made = []
    for i in range(count):
        ids = [[rng.choice((7, 8)) if i % 3 else 9 for _ in range(rng.randint(1, 12))] for _ in range(3)]
        made.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)))
    return made


def sequences(row: dict, mode: str, limit: int) -> list[tuple[list[int], list[bool]]]:
    """Ids and whether each belongs to the completion, cut as TRL's collator cuts them."""
    cut = slice(None, limit) if mode == "keep_start" else slice(-limit, None)
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        mask = [False] * len(row["prompt_ids"]) + [True] * len(row[side])
        found.append(((row["prompt_ids"] + row[side])[cut], mask[cut]))
    return found


@pytest.mark.parametrize("limit", [2, 5, 8, 30])
@pytest.mark.parametrize("mode", MODES)
def test_an_example_holds_the_sequences_of_trl(mode, limit):
    for row in rows():
        example = truncate(*row.values(), max_length=limit, truncation_mode=mode)
        expected = sequences(row, mode, limit)
        if mode == "keep_start" and len(row["prompt_ids"]) >= limit:
            assert example is None
            continue
        prompts = [example["prompt_ids"], example.get("rejected_prompt_ids", example["prompt_ids"])]
        sides = [example["chosen_ids"], example["rejected_ids"]]
        for prompt, side, (ids, mask) in zip(prompts, sides, expected, strict=True):
            assert prompt + side == ids
            assert [False] * len(prompt) + [True] * len(side) == mask


def test_the_cutting_is_that_of_trl():
    collator = pytest.importorskip("trl.trainer.dpo_trainer").DataCollatorForPreference
    for mode in MODES:
        kept = [r for r in rows() if mode == "keep_end" or len(r["prompt_ids"]) < 7]
        batch = collator(pad_token_id=0, max_length=7, truncation_mode=mode)(kept)
        ours = [sequences(row, mode, 7)[side] for side in (0, 1) for row in kept]
        for ids, attended, mask, (expected, completion) in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], ours, strict=True
        ):
            assert ids[attended.bool()].tolist() == expected
            assert mask[attended.bool()].bool().tolist() == completion


@pytest.mark.parametrize("share", ["none", "prompt", "prefix"])
def test_the_loss_is_that_of_each_sequence_alone(share, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MIN_LEFT_OUT", 1)  # however few rows cancel in the gradient, they are left out
    limit, data, model = 7, rows(12), tiny.llama()
    logps = [[], []]
    for row in data:
        for side, (ids, mask) in enumerate(sequences(row, "keep_end", limit)):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
            scored = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] * torch.tensor(mask[1:])
            logps[side].append(scored.sum())
    chosen, rejected = (torch.stack(side) for side in logps)
    delta = (chosen - chosen.detach() + 0.3) - (rejected - rejected.detach() - 0.2)
    loss = -torch.nn.functional.logsigmoid(0.1 * delta).mean()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    args = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=limit, share=share,
        truncation_mode="keep_end", gradient_checkpointing=False, ref_cache_dir=str(tmp_path), max_tokens_per_batch=30,
        per_device_train_batch_size=12,
    )  # fmt: skip
    trainer = DPOTrainer(model, args=args, train_dataset=data)
    examples = [trainer.train_dataset[i] for i in range(len(data))]
    for i, example in enumerate(examples):
        example["ref_chosen_logps"], example["ref_rejected_logps"] = chosen[i].item() - 0.3, rejected[i].item() + 0.2
    batch = trainer.data_collator(examples)
    assert len(batch["parts"]) > 1
    found = trainer.compute_loss(trainer.model, batch)
    found.backward()
    # The trainer keeps the reference's log-probs in float32.
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


def test_the_reference_cache_tells_prompts_of_the_rejected_apart(tmp_path):
    cache = RefCache(tmp_path, weights="w", precision="fp64", version="1")
    example = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    cache.put_many([example, {**example, "rejected_prompt_ids": [2]}], [[1, 2], [3, 4]])
    assert cache.get({**example, "rejected_prompt_ids": [2]}) == (3, 4)
    assert cache.get({**example, "rejected_prompt_ids": [1]}) is None
    assert cache.get(example) == (1, 2)
