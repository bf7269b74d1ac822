"""The pairs of a run's forward passes, computed without a model: `--inspect_data` counts them."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, SequentialSampler

from ..data.examples import Examples
from ..forest.batch import ForestCollator
from .token_batches import TokenBatches


class Batches:
    """Batches one after the other, each as the groups that go through the model together; none is kept.

    sampler: makes an iterable of lists of indices with a length, anew for every pass.
    """

    def __init__(self, examples: Sequence[Mapping], sampler: Callable, args):
        self.examples, self.sampler, self.args = examples, sampler, args

    def __len__(self) -> int:
        return len(self.sampler())

    def __iter__(self) -> Iterator[list[list[Mapping]]]:
        collator = ForestCollator(self.args.share, max_tokens=self.args.max_tokens_per_batch)
        for batch in self.sampler():
            yield collator.split([self.examples[i] for i in batch])


def training_batches(examples: Sequence[Mapping], args, by_tokens: bool = True) -> Batches:
    """The micro-batches of the first epoch, in training's order, each as the groups that go through the model together.

    The sampler is the one with which accelerate replaces transformers' own. Ranks take these batches in turns.
    by_tokens: follow tokens_per_step where it is set; False: batches of per_device_train_batch_size pairs.
    """
    if by_tokens and args.tokens_per_step is not None:
        filled = token_batches(Examples.of(examples), args.share, args)
        return Batches(examples, lambda: filled, args)

    def sampler() -> BatchSampler:
        order = (
            SequentialSampler(examples) if _in_order(args) else SeedableRandomSampler(examples, data_seed=_seed(args))
        )
        return BatchSampler(order, args.per_device_train_batch_size, args.dataloader_drop_last)

    return Batches(examples, sampler, args)


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


def evaluation_batches(examples: Sequence[Mapping], args) -> Batches:
    """The batches of an evaluation, with the pairs in their given order."""
    sampler = BatchSampler(SequentialSampler(examples), args.per_device_eval_batch_size, False)
    return Batches(examples, lambda: sampler, args)
