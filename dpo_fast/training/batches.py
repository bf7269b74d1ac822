"""The pairs of a run's forward passes, computed without a model: `--inspect_data` counts them."""

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, SequentialSampler

from ..forest.batch import ForestCollator


def training_batches(examples: list[dict], args) -> list[list[list[dict]]]:
    """The micro-batches of the first epoch, in training's order, each as the groups that go through the model together.

    The sampler is the one with which accelerate replaces transformers' own. Ranks take these batches in turns.
    """
    if getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy) == "sequential":
        sampler = SequentialSampler(examples)
    else:
        sampler = SeedableRandomSampler(examples, data_seed=args.seed if args.data_seed is None else args.data_seed)
    batches = BatchSampler(sampler, args.per_device_train_batch_size, args.dataloader_drop_last)
    return _groups(examples, batches, args)


def evaluation_batches(examples: list[dict], args) -> list[list[list[dict]]]:
    """The batches of an evaluation, with the pairs in their given order."""
    return _groups(examples, BatchSampler(SequentialSampler(examples), args.per_device_eval_batch_size, False), args)


def _groups(examples, batches, args):
    collator = ForestCollator(args.share, max_tokens=args.max_tokens_per_batch)
    return [collator.split([examples[i] for i in batch]) for batch in batches]
