"""The pairs of a run's forward passes, computed without a model: `--inspect_data` counts them."""

from collections.abc import Mapping, Sequence

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, SequentialSampler

from ..data.examples import Examples
from ..forest.batch import ForestCollator
from .token_batches import TokenBatches


def training_batches(examples: Sequence[Mapping], args, by_tokens: bool = True) -> list[list[list[Mapping]]]:
    """The micro-batches of the first epoch, in training's order, each as the groups that go through the model together.

    The sampler is the one with which accelerate replaces transformers' own. Ranks take these batches in turns.
    by_tokens: follow tokens_per_step where it is set; False: batches of per_device_train_batch_size pairs.
    """
    if by_tokens and args.tokens_per_step is not None:
        return _groups(examples, token_batches(Examples.of(examples), args.share, args), args)
    if _in_order(args):
        sampler = SequentialSampler(examples)
    else:
        sampler = SeedableRandomSampler(examples, data_seed=_seed(args))
    batches = BatchSampler(sampler, args.per_device_train_batch_size, args.dataloader_drop_last)
    return _groups(examples, batches, args)


def batch_budget(args) -> int:
    """Tokens of one micro-batch of one process under `tokens_per_step`."""
    return args.tokens_per_step // (args.world_size * args.gradient_accumulation_steps)


def token_batches(examples: Examples, share: str, args) -> TokenBatches:
    """The batch sampler of `tokens_per_step`."""
    return TokenBatches(
        examples, share, batch_budget(args), None if _in_order(args) else _seed(args), args.dataloader_drop_last
    )


def _in_order(args) -> bool:
    return getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy) == "sequential"


def _seed(args) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def evaluation_batches(examples: Sequence[Mapping], args) -> list[list[list[Mapping]]]:
    """The batches of an evaluation, with the pairs in their given order."""
    return _groups(examples, BatchSampler(SequentialSampler(examples), args.per_device_eval_batch_size, False), args)


def _groups(examples, batches, args):
    collator = ForestCollator(args.share, max_tokens=args.max_tokens_per_batch)
    return [collator.split([examples[i] for i in batch]) for batch in batches]
