"""A streamed data set trains as the list of its rows would in that order, and what needs its length is refused by name."""

import pytest
import torch

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny  # noqa: E402
from disk_tools import fields, random_rows  # noqa: E402
from tokenizer_tools import chat_row, letters, text_row  # noqa: E402
from trainer_tools import config, weights  # noqa: E402

from dpo_fast import DPOTrainer  # noqa: E402
from dpo_fast.data.pairs import prepare  # noqa: E402

ONLINE = {"max_steps": 4, "per_device_train_batch_size": 4}


def streamed(rows):
    def generate():
        yield from rows

    return datasets.IterableDataset.from_generator(generate)


def test_examples_are_those_of_the_list(tmp_path, caplog):
    args = config(tmp_path, max_length=20, skip_bad_rows=True, **ONLINE)
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in random_rows(150)]
    rows.insert(30, text_row("a", "b", ""))
    rows.insert(70, text_row("p" * 50, "a", "b"))
    plain = prepare(rows, letters(), args, 100, "train")
    caplog.clear()
    stream = prepare(streamed(rows), letters(), args, 100, "train")
    for _ in range(2):
        found = list(stream)
        assert [fields(e) for e in found] == [fields(e) for e in plain.examples]
        assert [e["index"] for e in found] == list(range(len(plain)))
        assert [place for place, _ in stream.dropped] == ["train row 30", "train row 70"]
    assert "train row 30 is left out, and maybe others: 'rejected' is empty" in caplog.text
    with pytest.raises(ValueError, match="train row 0 has a token id outside"):
        prepare(streamed(tiny.pairs(4)), None, args, 3, "train")
    late = [{"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [2]}] * 100 + tiny.pairs(1)
    with pytest.raises(ValueError, match="train row 100 has a token id outside"):
        list(prepare(streamed(late), None, args, 3, "train"))
    with pytest.raises(ValueError, match="text and messages are mixed: train row 1"):
        prepare(streamed([text_row("a", "b", "c"), chat_row("a", "b", "c")]), letters(), args, 100, "train")
    with pytest.raises(ValueError, match="no usable pair in the train data, which is streamed"):
        prepare(streamed([]), letters(), args, 100, "train")


def test_a_dict_of_splits_is_refused(tmp_path):
    for kind, data in ((datasets.DatasetDict, datasets.Dataset.from_list(tiny.pairs(4))), (dict, tiny.pairs(4))):
        with pytest.raises(ValueError, match="the train data is a dict of 'train': pass one of its values"):
            prepare(kind(train=data), None, config(tmp_path), 61, "train")


def test_one_worker_reads(tmp_path, caplog):
    """Each of several would read all rows."""
    decided = {"gradient_checkpointing": False, "ddp_find_unused_parameters": False}
    args = config(tmp_path, **{**ONLINE, **decided, "max_length": 100, "dataloader_num_workers": 2})
    trainer = DPOTrainer(tiny.llama(), args=args, train_dataset=streamed(tiny.pairs(8)))
    assert "one worker reads it" in caplog.text
    seen = [i for batch in trainer.get_train_dataloader() for part in batch["parts"] for i in part.index.tolist()]
    assert seen == list(range(8))
    # What a stream needs is set for this run alone.
    assert (args.dataloader_num_workers, args.accelerator_config.dispatch_batches) == (2, None)


def test_training_is_that_of_the_list(tmp_path):
    rows = tiny.pairs(16)

    def run(name, data, resume=None, **changes):
        args = config(
            tmp_path / name,
            **{**ONLINE, "precompute_ref_log_probs": False, "max_length": 100, "optim": "adamw_torch", **changes},
        )
        trainer = DPOTrainer(tiny.llama(), tiny.llama(seed=1), args, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer.model)

    expected = run("list", rows, train_sampling_strategy="sequential")
    assert torch.equal(run("stream", streamed(rows), save_strategy="steps", save_steps=2), expected)
    assert torch.equal(run("again", streamed(rows), str(tmp_path / "stream/run/checkpoint-2")), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "the train data is streamed, so nobody knows where an epoch ends: set max_steps"),
        (
            {"precompute_ref_log_probs": True},
            "precompute_ref_log_probs is not supported with IterableDataset: .* cannot be computed",
        ),
        ({"tokens_per_step": 100, "per_device_train_batch_size": 8}, "streamed: tokens_per_step"),
        ({"fsdp": True}, "streamed, so the reference is a second model, which is not sharded"),
        ({"max_length": 1024}, "the model has 128 positions .*set max_length to 128 at most"),
    ],
)
def test_refused(tmp_path, changes, message):
    options = {**ONLINE, "max_length": 100, **changes}
    with pytest.raises(ValueError, match=message):
        DPOTrainer(tiny.llama(), args=config(tmp_path, **options), train_dataset=streamed(tiny.pairs(8)))
