"""`tokens_per_step`: batches filled to a budget of tokens. The forests that come out are what is counted."""

import pytest
import torch

pytest.importorskip("transformers")

import itertools

import tiny
from trainer_tools import config, weights

from dpo_fast import DPOTrainer
from dpo_fast.data.examples import Examples
from dpo_fast.forest.packing import SHARE_MODES, PrefixForest
from dpo_fast.training.batches import training_batches
from dpo_fast.training.token_batches import TokenBatches

BUDGET = 120


def ranked(prompts=12, n=4) -> list[dict]:
    """All pairs of `n` completions of each prompt, those of different prompts in turns; two pairs begin with other prompts."""
    rows = tiny.pairs(n * prompts, longest=12)
    sides = [row["chosen_ids"] for row in rows]
    pairs = [
        [
            {"prompt_ids": rows[p]["prompt_ids"], "chosen_ids": sides[n * p + i], "rejected_ids": sides[n * p + j]}
            for i in range(n)
            for j in range(i + 1, n)
            if sides[n * p + i] != sides[n * p + j]
        ]
        for p in range(prompts)
    ]
    mixed = [group[k] for k in range(6) for group in pairs if k < len(group)]
    mixed[3]["rejected_prompt_ids"] = mixed[3]["prompt_ids"][1:]
    return mixed


@pytest.mark.parametrize("share", SHARE_MODES)
def test_batches_fill_the_budget_and_keep_prompts_together(share):
    rows = ranked()
    examples = Examples.of(rows)
    batches = TokenBatches(examples, share, BUDGET, seed=3)
    epochs = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
    assert len(batches) == len(epochs[0])
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert sorted(i for batch in epochs[0] for i in batch) == list(range(len(rows)))
    again = TokenBatches(Examples.of(rows), share, BUDGET, seed=3)
    again.set_epoch(1)
    assert list(again) == epochs[1]
    assert list(TokenBatches(examples, share, BUDGET, seed=4)) != epochs[0]
    computed = 0
    for batch in epochs[0]:
        # The last token of a sequence is counted and not computed: what is full may be a few rows short.
        forest = PrefixForest.from_pairs([rows[i] for i in batch], share=share, keep_last=True)
        assert forest.rows <= BUDGET
        computed += forest.rows
        prompts = [tuple(rows[i]["prompt_ids"]) for i in batch]
        runs = [p for k, p in enumerate(prompts) if k == 0 or prompts[k - 1] != p]
        assert len(runs) == len(set(runs))
    assert computed > 0.6 * BUDGET * len(batches)
    # Two batches in a row of the order they were filled in do not fit into one.
    filled = [PrefixForest.from_pairs([rows[i] for i in b], share=share, keep_last=True).rows for b in batches.batches]
    assert all(a + b > 0.75 * BUDGET for a, b in itertools.pairwise(filled))


def test_the_order_of_the_data_and_a_last_batch_left_out():
    rows = tiny.pairs(20)
    for row in rows:
        row["prompt_ids"] = [*row["prompt_ids"], rows.index(row) + 3]
    batches = TokenBatches(Examples.of(rows), "prefix", BUDGET, seed=None)
    assert [i for batch in batches for i in batch] == list(range(20))
    batches.set_epoch(1)
    assert [i for batch in batches for i in batch] == list(range(20))
    dropped = TokenBatches(Examples.of(rows), "prefix", BUDGET, seed=None, drop_last=True)
    assert list(dropped) == list(batches)[:-1]
    with pytest.raises(ValueError, match=r"20 pairs have more tokens than the 3 of a batch .*raise tokens_per_step"):
        TokenBatches(Examples.of(rows), "prefix", 3, seed=0)


def tokens(rows):
    return int(Examples.of(rows).pair_tokens("prefix").sum())


def test_a_step_is_the_mean_over_its_pairs(tmp_path):
    rows = tiny.pairs(12)

    def stepped(name, **changes):
        trainer = DPOTrainer(tiny.llama(), tiny.llama(seed=1), config(tmp_path / name, **changes), train_dataset=rows)
        trainer.train()
        assert trainer.state.global_step == 1
        return trainer

    whole = stepped("pairs", per_device_train_batch_size=12)
    once = stepped("tokens", tokens_per_step=tokens(rows))
    # Two batches with unequal numbers of pairs: one step, the mean over all twelve.
    for budget in range(tokens(rows) // 2, tokens(rows)):
        sizes = [len(batch) for batch in TokenBatches(Examples.of(rows), "prefix", budget, seed=42)]
        if len(sizes) == 2 and sizes[0] != sizes[1]:
            break
    twice = stepped("accumulated", tokens_per_step=2 * budget, gradient_accumulation_steps=2)
    for other in (once, twice):
        torch.testing.assert_close(weights(other.model), weights(whole.model), rtol=0, atol=1e-12)
        logs = [trainer.state.log_history[0] for trainer in (other, whole)]
        assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-12)


def test_any_number_of_workers_and_a_resumed_run_see_the_same_batches(tmp_path):
    rows, budget = ranked(6), BUDGET // 2
    seen = {}

    def run(name, resume=None, **changes):
        order = seen[name] = []

        class Recorded(DPOTrainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                order.append([i for part in inputs["parts"] for i in part.index.tolist()])
                return super().compute_loss(model, inputs, *args, **kwargs)

        options = {"tokens_per_step": budget, "max_steps": -1, "num_train_epochs": 3, "optim": "adamw_torch", **changes}
        trainer = Recorded(tiny.llama(), tiny.llama(seed=1), config(tmp_path, **options), train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    plain = run("plain")
    per_epoch = len(plain.get_train_dataloader())
    assert 4 <= per_epoch == len(seen["plain"]) // 3
    expected = training_batches(plain.train_dataset.examples, plain.args)
    assert [[e["index"] for group in batch for e in group] for batch in expected] == seen["plain"][:per_epoch]
    assert seen["plain"][:per_epoch] != seen["plain"][per_epoch : 2 * per_epoch]
    middle = per_epoch + 2  # inside the second epoch
    saved = {"save_strategy": "steps", "save_steps": middle, "dataloader_num_workers": 2}
    run("workers", **saved)
    assert seen["workers"] == seen["plain"]
    resumed = run("resumed", resume=str(tmp_path / f"run/checkpoint-{middle}"))
    assert seen["resumed"] == seen["plain"][middle:]
    assert torch.equal(weights(resumed.model), weights(plain.model))
    with pytest.raises(ValueError, match=f"tokens_per_step was {budget}, is {budget + 9}"):
        run("other", resume=str(tmp_path / f"run/checkpoint-{middle}"), tokens_per_step=budget + 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 3}, "exclude each other"),
        ({"loss_type": ["aot"]}, "compares all pairs of a batch"),
        ({"tokens_per_step": 0}, "tokens_per_step must be at least 1"),
    ],
)
def test_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{"tokens_per_step": 1000, **changes})
