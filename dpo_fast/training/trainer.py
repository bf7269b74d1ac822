"""`DPOTrainer`: transformers' Trainer over prefix forests.

This file says how losses add up over parts, micro-batches and ranks. batch_loss.py says how a batch becomes a loss,
reporting.py what is logged of it; checkpoints, resume, signals and saving are in life.py; run_setup.py sets up the model, the reference and
the data. Everything else (schedules, logging, evaluation, launchers, sharding) is transformers' own.
"""

import contextlib
import copy

import torch

from ..data.pairs import PairDataset, prepare
from ..data.streamed import is_stream
from ..forest.batch import ForestCollator, padded_tokens
from ..forest.model import prepare_model
from . import metrics
from .batch_loss import Totals
from .batches import token_batches
from .compiling import compile_layers, no_compilation
from .config import DPOConfig
from .fingerprint import fingerprint
from .ref_cache import RefCache
from .ref_model import CACHED, MODEL, SyncRefModelCallback, precompute, reference_cache
from .reporting import Reporting
from .run_setup import RunPlan, plan_run, set_up
from .sharding import already_prepared, deferred_sync, is_fsdp2, settle_plugin
from .start_checks import verify_start
from .start_model import start_model


class DPOTrainer(Reporting):
    """Train `model` on preference pairs; arguments as in TRL's `DPOTrainer`.

    model: a name or folder (loaded with `args.model_init_kwargs`), a transformers causal LM, a PEFT model, a module that
        follows `dpo_fast.forest.gate.HiddenStateModel`, or what `plan_run` made of one of these.
    ref_model: the reference. If left out, it is the model as it is passed in; a copy of it is kept in memory only where its
        log-probs are neither precomputed nor computed by switching adapters off.
    train_dataset, eval_dataset: rows in any layout of `dpo_fast.data` (datasets.Dataset or list of mappings) or rows
        with `prompt_ids`, `chosen_ids` and `rejected_ids`; `eval_dataset` may be a dict of several. `train_dataset` may
        also be a datasets.IterableDataset, with max_steps; its reference is computed in every step.
    processing_class: the tokenizer. If left out, it is loaded from the model's folder.
    peft_config: wraps the model in adapters.
    quantization_config: transformers' BitsAndBytesConfig, for a frozen base in 4 or 8 bits under adapters.

    Raises ValueError for options and data that cannot work, before any step is spent.
    """

    def __init__(
        self,
        model,
        ref_model=None,
        args: DPOConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
    ):
        if data_collator is not None:
            raise ValueError("data_collator cannot be given: batches are prefix forests, no padded rows; leave it out")
        if compute_metrics is not None:
            raise ValueError("compute_metrics cannot be given: no logits exist to compute from; leave it out")
        if train_dataset is None and eval_dataset is None:
            raise ValueError("`train_dataset` is required (or eval_dataset, to evaluate alone)")
        args = args or DPOConfig()
        streamed = is_stream(train_dataset)
        if args.gradient_checkpointing is None or args.ddp_find_unused_parameters is None or streamed:
            args = copy.copy(args)  # the decision is this run's: another may take other pairs or another model
        run = model
        if not isinstance(model, RunPlan):
            run = plan_run(model, args, ref_model, peft_config, quantization_config, streamed)
        self.setup = set_up(run, args, processing_class, train_dataset, eval_dataset)
        self.share = self.setup.share
        super().__init__(
            model=self.setup.model,
            args=args,
            data_collator=ForestCollator(
                self.share, self.setup.aux_coef > 0, args.max_tokens_per_batch, self.setup.loss_options.margin_only
            ),
            train_dataset=self.setup.train_dataset,
            eval_dataset=self.setup.eval_dataset,
            processing_class=self.setup.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError("several GPUs need one process each: start with `accelerate launch` or `torchrun`")
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError("fsdp has no effect: accelerate shards over several accelerators only")
        if args.max_tokens_per_batch is not None and self.setup.aux_coef:
            raise ValueError(
                "max_tokens_per_batch would change the auxiliary loss of a mixture of experts, which is no sum over "
                "pairs: set router_aux_loss_coef=0, or lower per_device_train_batch_size"
            )
        if args.max_tokens_per_batch is not None and self.is_deepspeed_enabled:
            raise ValueError(
                "max_tokens_per_batch splits batches, which DeepSpeed's engine counts itself: leave it out"
            )
        self.statistics = metrics.STATISTICS + (("log_sum_sq_probs",) if args.use_weighting else ())
        self.ref_model = self.setup.ref_model
        if self.ref_model is not None:
            if self.setup.reference == MODEL:  # otherwise it is moved to the device for the reference pass only
                self.ref_model.to(self.accelerator.device)
            prepare_model(self.ref_model, backend=args.backend)
            compile_layers(self.ref_model, args)
            if args.sync_ref_model:
                alpha, steps = args.ref_model_mixup_alpha, args.ref_model_sync_steps
                self.add_callback(SyncRefModelCallback(self.ref_model, alpha, steps))
        self._sums: torch.Tensor | None = None  # sums of metrics.COLUMNS since the last log
        self._aux_loss: float | None = None  # the last log's, which the summary at the end repeats as TRL's does
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []  # (index, table) of the evaluation in progress
        self._eval_totals: Totals | None = None
        self._started = self._verified = self._sharded = False
        self._ref_cache: RefCache | None = None
        if is_fsdp2(self.accelerator):
            settle_plugin(self.accelerator)
        self._begin_life()
        self.train_dataset = self._with_reference(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {k: self._with_reference(v, k) for k, v in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._with_reference(self.eval_dataset, "eval")

    # TRL's names for what users and callbacks read.

    beta = property(lambda self: self.args.beta)
    loss_types = property(lambda self: self.args.loss_type)
    aux_loss_enabled = property(lambda self: self.setup.aux_coef > 0)

    def _build_accelerator_args(self, **kwargs):
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": no_compilation(self.args)}

    # Data.

    def _with_reference(self, data: PairDataset | None, name: str) -> PairDataset | None:
        if data is not None and self.setup.reference == CACHED and data.examples.reference is None:
            model = self.ref_model or self.model
            if self._has_trained and self.ref_model is None and not self.setup.adapters:
                data.set_reference(precompute(self, start_model(self), data.examples, name))
                return data
            if self._ref_cache is None:  # named by whole weights, which no rank has once the model is sharded
                self._ref_cache = reference_cache(self, model)
            data.set_reference(precompute(self, model, data.examples, name, self._ref_cache))
        return data

    @property
    def _has_trained(self) -> bool:
        return self._started or self.state.global_step > 0

    def get_train_dataloader(self):
        """As `Trainer.get_train_dataloader`; with `tokens_per_step`, over batches that are filled to that budget."""
        if self.args.tokens_per_step is None or self.train_dataset is None:
            return super().get_train_dataloader()
        args = self.args
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=token_batches(self.train_dataset.examples, self.share, args),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def shard(self) -> None:
        """Under FSDP2: give every rank its shard of the policy and of the optimizer's weights, once; else nothing.

        transformers would do so later; the reference pass and an evaluation before training need it first. What is
        checked or named by whole weights comes before.
        """
        if not is_fsdp2(self.accelerator) or self._sharded:
            return
        self._verify()
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self)
        self.create_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.model
        self._sharded = True

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self.shard()
        ready = already_prepared(self.accelerator, self.model, self.optimizer)
        with ready if self._sharded else contextlib.nullcontext():
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate as `Trainer.evaluate` does; rows that were not given at construction are prepared here."""
        if eval_dataset is not None and not isinstance(eval_dataset, (PairDataset, dict, str)):
            data = prepare(
                eval_dataset, self.setup.tokenizer, self.args, self.setup.vocab_size, metric_key_prefix, self.share
            )
            eval_dataset = self._with_reference(data, metric_key_prefix)
        self._verify()
        self.shard()
        with self.throughput.paused():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # A step.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and the totals that its gradient is a mean over."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        parts = [part for batch in batches for part in batch["parts"]]
        counts = [0.0] * 6
        for part in parts:
            forest = part.forest
            live = forest.targets.numel(), forest.grad_items
            mine = (part.pairs, part.chosen_tokens, forest.num_tokens, forest.rows, *live)
            counts = [a + b for a, b in zip(counts, mine, strict=True)]
        counts.append(sum(padded_tokens(batch["parts"]) for batch in batches))
        if self.accelerator.num_processes > 1:
            counts.append(self.termination.vote)
            *counts, votes = self.accelerator.reduce(torch.tensor(counts, dtype=torch.float64, device=device))
            self.termination.count(votes)
        self.throughput.add(counts)
        return batches, Totals(counts[0], counts[1] / counts[0] if parts else 1.0)

    def training_step(self, model, inputs, num_items_in_batch: Totals | None = None) -> torch.Tensor:
        """Forward and backward of one micro-batch, part by part; returns its share of the step's mean loss."""
        model.train()
        if is_fsdp2(self.accelerator):  # transformers defers it between micro-batches, with whole gradients in memory
            model.set_requires_gradient_sync(True)
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()  # schedule-free optimizers
        parts = [part.on(self.args.device) for part in inputs["parts"]]
        totals = num_items_in_batch or Totals.of(parts)
        # Gradients are averaged over ranks, and the mean is over the pairs of all of them.
        scale = self.accelerator.num_processes / totals.pairs
        extra = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        total = torch.zeros((), device=self.args.device)
        for part, counts, last in self._passes(parts):
            with contextlib.nullcontext() if last else deferred_sync(self.accelerator, model):
                with self.compute_loss_context_manager():
                    loss, table, losses = self._loss_and_table(model, part, totals)
                loss = loss * (part.pairs * scale * counts)
                self.accelerator.backward(loss, **extra)
            if counts:
                self.watch.add(self.state.global_step + 1, part.index, losses)
                sums, loss = table.sum(0), loss.detach()
                if self.args.on_nan == "skip":  # a pass that is left out must not enter the means
                    sums, loss = (torch.where(losses.isfinite().all(), x, torch.zeros_like(x)) for x in (sums, loss))
                self._sums = sums if self._sums is None else self._sums + sums
                total += loss
        self._started = True
        return total

    def _verify(self) -> None:
        """Check the start once, before training or evaluation lets accelerate wrap the model and change its precision."""
        if self.args.verify and not self._verified and self.train_dataset:
            off = self.args.disable_dropout
            verify_start(self.model, self.setup.plan, self.train_dataset, self.share, deterministic=off)
        self._verified = True

    def floating_point_ops(self, inputs) -> float:
        """Operations of a micro-batch, forward and backward, for the trainer's `total_flos`."""
        forests = [part.forest for part in inputs["parts"]]
        return sum(self.setup.flops(f.rows, f.targets.numel(), f.grad_items) for f in forests)
