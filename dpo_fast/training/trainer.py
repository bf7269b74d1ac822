"""`DPOTrainer`: transformers' Trainer over prefix forests.

What is here: how a batch becomes a loss, how losses add up over parts, micro-batches and ranks, and where metrics go.
Checkpoints, resume, signals and saving are in life.py; how the model, the reference and the data are set up is in
run_setup.py. Everything else (schedules, logging, evaluation, launchers, sharding) is transformers' own.
"""

import contextlib
import copy
import dataclasses

import torch

from ..data.pairs import PairDataset, prepare
from ..forest.batch import ForestCollator, Part, padded_tokens
from ..forest.model import prepare_model
from ..forest.paths import wpo_weights
from ..losses import objective
from . import metrics
from .config import DPOConfig
from .life import HALF, RunLife
from .ref_model import CACHED, MODEL, NONE, SyncRefModelCallback, as_reference, precompute
from .run_setup import RunPlan, plan_run, set_up
from .start_checks import check_start, verify_start


@dataclasses.dataclass
class Totals:
    """What a gradient is a mean over: the pairs of one optimizer step, over its micro-batches and all ranks."""

    pairs: torch.Tensor | float
    mean_chosen_length: torch.Tensor | float

    @classmethod
    def of(cls, parts: list[Part]) -> "Totals":
        """Of the pairs in `parts` alone."""
        pairs = sum(part.pairs for part in parts)
        return cls(pairs, max(sum(part.chosen_tokens for part in parts), 1) / pairs)


class DPOTrainer(RunLife):
    """Train `model` on preference pairs; arguments as in TRL's `DPOTrainer`.

    model: a name or folder (loaded with `args.model_init_kwargs`), a transformers causal LM, a PEFT model, a module that
        follows `dpo_fast.forest.gate.HiddenStateModel`, or what `plan_run` made of one of these.
    ref_model: the reference. Left out, it is the model as it is passed in, kept in memory only where its log-probs are
        neither precomputed nor to be had by switching adapters off.
    train_dataset, eval_dataset: rows in any layout of `dpo_fast.data` (datasets.Dataset or list of mappings) or rows
        with `prompt_ids`, `chosen_ids` and `rejected_ids`; `eval_dataset` may be a dict of several.
    processing_class: the tokenizer. Left out, it is loaded from the model's folder when rows are text.
    peft_config: wraps the model in adapters.

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
        if quantization_config is not None:
            raise ValueError("quantization_config is not supported: use peft_config with bfloat16 weights instead")
        args = args or DPOConfig()
        if args.gradient_checkpointing is None:
            args = copy.copy(args)  # the decision is this run's: another may take other pairs or another model
        run = model if isinstance(model, RunPlan) else plan_run(model, args, ref_model, peft_config)
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
            if self.setup.reference == MODEL:  # else it is moved to the device for the reference pass only
                self.ref_model.to(self.accelerator.device)
            prepare_model(self.ref_model, backend=args.backend)
            if args.sync_ref_model:
                alpha, steps = args.ref_model_mixup_alpha, args.ref_model_sync_steps
                self.add_callback(SyncRefModelCallback(self.ref_model, alpha, steps))
        self._sums: torch.Tensor | None = None  # of metrics.COLUMNS since the last log
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the evaluation in progress
        self._eval_totals: Totals | None = None
        self._started = self._verified = False
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

    # Data.

    def _with_reference(self, data: PairDataset | None, name: str) -> PairDataset | None:
        if data is not None and self.setup.reference == CACHED and "ref_chosen_logps" not in data[0]:
            data.set_reference(precompute(self, self.ref_model or self.model, data.examples, name))
        return data

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As `Trainer.evaluate`; rows that were not given at construction are prepared here."""
        if eval_dataset is not None and not isinstance(eval_dataset, (PairDataset, dict, str)):
            if self.setup.reference == CACHED and self._started and not self.setup.adapters and self.ref_model is None:
                raise ValueError(
                    "the reference of these rows cannot be computed any more, since the model has been trained: pass "
                    "them as eval_dataset at construction, or set precompute_ref_log_probs=False"
                )
            data = prepare(
                eval_dataset, self.setup.tokenizer, self.args, self.setup.vocab_size, metric_key_prefix, self.share
            )
            eval_dataset = self._with_reference(data, metric_key_prefix)
        self._verify()
        with self.throughput.paused():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # The loss.

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: Totals | None = None):
        """The mean loss of the pairs in `inputs`, as transformers' trainers compute it; override it to change the loss.

        Args:
            inputs: `{"parts": [Part, ...]}`; training and evaluation call this once per part, one forward pass.
            num_items_in_batch: what the step's gradient is a mean over; None: the pairs of `inputs` alone.

        Returns:
            the loss, a scalar with a gradient, or with `return_outputs` (loss, outputs). `outputs["pair_table"]` [B, columns]
            holds the metrics' sums per pair (metrics.py), the others are `PreferenceOutput`'s fields [B]. An override hands
            on the outputs of `super().compute_loss(model, inputs, True, num_items_in_batch)`, or what it made of them.
        """
        parts = [part.on(self.args.device) for part in inputs["parts"]]
        totals = num_items_in_batch or Totals.of(parts)
        found = [self._part_loss(model, part, totals.mean_chosen_length) for part in parts]
        loss = sum(loss for loss, _ in found) / sum(part.pairs for part in parts)
        if not return_outputs:
            return loss
        return loss, {name: torch.cat([outputs[name] for _, outputs in found]) for name in found[0][1]}

    def _part_loss(self, model, part: Part, mean_chosen_length) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of the pairs' losses, and what `compute_loss` returns beside it."""
        args, forest, setup = self.args, part.forest, self.setup
        out = model(forest=forest, outputs=self.statistics, aux_loss=setup.aux_coef > 0)
        chosen, rejected = forest.sum_paths(out["token_logps"], args.ld_alpha)
        reference = self.reference_logps(part)
        weights = None
        if args.use_weighting:
            paths = [forest.gather_paths(out[name]) for name in ("token_logps", "log_sum_sq_probs")]
            weights = wpo_weights(*paths, forest.lengths)
        label_smoothing = None
        if part.p_chosen is not None and args.label_noise == "weight":
            weights = part.p_chosen if weights is None else weights * part.p_chosen
        elif part.p_chosen is not None:
            label_smoothing = 1 - part.p_chosen
        chosen_lengths, rejected_lengths = forest.lengths.view(2, -1)
        result = objective(
            setup.loss_options,
            chosen,
            rejected,
            *((None, None) if reference is None else reference),
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            pair_weights=weights,
            label_smoothing=label_smoothing,
            mean_chosen_length=mean_chosen_length if setup.loss_options.token_mean else None,
        )
        self._check_start(result)
        aux = out.get("aux_loss")
        loss = result.losses.sum()
        if aux is not None:
            loss = loss + setup.aux_coef * aux * part.pairs
        delta = torch.zeros_like(chosen) if reference is None else chosen.detach() - reference[0]
        outputs = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        del outputs["loss"]
        return loss, {**outputs, "pair_table": metrics.pair_table(forest, out, result, delta, aux)}

    def _loss_and_table(self, model, part: Part, totals: Totals) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`compute_loss` of one part, an override's too, its table with that loss in the column `loss`, and losses [B]."""
        loss, outputs = self.compute_loss(model, {"parts": [part]}, return_outputs=True, num_items_in_batch=totals)
        table = outputs["pair_table"] if isinstance(outputs, dict) and "pair_table" in outputs else None
        if table is None:
            raise ValueError(
                "compute_loss must return (loss, outputs) with the outputs of super().compute_loss(..., "
                "return_outputs=True): the metrics are in them"
            )
        # What the base did not put there itself (an auxiliary loss, an override's terms) is the same for every pair.
        column = metrics.COLUMNS.index("loss")
        losses = table[:, column].clone()
        rest = loss.detach().double() - losses.mean()
        table[:, column] += rest
        # A loss that is nan makes every pair's share of it nan: what is not finite is told by the pair's own loss.
        return loss, table, torch.where(losses.isfinite().all(), losses + rest, losses)

    def reference_logps(self, part: Part) -> torch.Tensor | None:
        """Summed log-probs of the part's pairs under the reference, [2, B] (chosen, rejected); None where a loss has none."""
        if self.setup.reference == NONE:
            return None
        if self.setup.reference == CACHED:
            if part.ref_logps is None:
                raise ValueError("these pairs have no reference log-probs: pass them to DPOTrainer, or as rows")
            return part.ref_logps
        model = self.ref_model or self.model_wrapped
        # The policy's autocast is inside accelerate's wrapper, which a second model does not have.
        with as_reference(model, self.ref_model is None), self.accelerator.autocast():
            token_logps = model(forest=part.forest)["token_logps"]
        return part.forest.sum_paths(token_logps, self.args.ld_alpha)

    def compute_ref_log_probs(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """TRL's name: chosen and rejected log-probs [B] of `inputs` under `model` as the reference, adapters switched off."""
        adapters = model is self.model and hasattr(model, "disable_adapter")
        found = []
        with as_reference(model, adapters), self.accelerator.autocast():
            for part in inputs["parts"]:
                forest = part.on(self.args.device).forest
                found.append(forest.sum_paths(model(forest=forest)["token_logps"], self.args.ld_alpha))
        chosen, rejected = torch.cat(found, dim=1)
        return chosen, rejected

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
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()  # schedule-free optimizers
        parts = [part.on(self.args.device) for part in inputs["parts"]]
        totals = num_items_in_batch or Totals.of(parts)
        # Gradients are averaged over ranks, and the mean is over the pairs of all of them.
        scale = self.accelerator.num_processes / totals.pairs
        extra = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        total = torch.zeros((), device=self.args.device)
        for part, counts, last in self._passes(parts):
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss, table, losses = self._loss_and_table(model, part, totals)
                loss = loss * (part.pairs * scale * counts)
                self.accelerator.backward(loss, **extra)
            if counts:
                self.watch.add(self.state.global_step + 1, part.index, losses)
                sums, loss = table.sum(0), loss.detach()
                if self.args.on_nan == "skip":  # what is left out is no part of the means
                    sums, loss = (torch.where(losses.isfinite().all(), x, torch.zeros_like(x)) for x in (sums, loss))
                self._sums = sums if self._sums is None else self._sums + sums
                total += loss
        self._started = True
        return total

    def _passes(self, parts: list[Part]):
        """(part, counts, last) as often on every rank: one with fewer parts repeats its last, which does not count."""
        passes = len(parts)
        if self.args.max_tokens_per_batch is not None and self.accelerator.num_processes > 1:
            passes = int(self.accelerator.gather(torch.tensor([passes], device=self.args.device)).max())
        for i in range(passes):
            yield parts[min(i, len(parts) - 1)], i < len(parts), i == passes - 1

    def _check_start(self, result) -> None:
        """Before the very first step, policy and reference are the same model: say so where they are not."""
        if self._started or self.state.global_step or self.setup.reference == NONE or self.setup.foreign_reference:
            return
        if self.model.training:
            low = self.accelerator.mixed_precision != "no" or next(self.model.parameters()).dtype in HALF
            check_start(result.chosen_rewards, result.rejected_rewards, low)

    def _verify(self) -> None:
        """Before accelerate wraps the model (training and evaluation do), so that the weights' own precision is used."""
        if self.args.verify and not self._verified and self.train_dataset:
            off = self.args.disable_dropout
            verify_start(self.model, self.setup.plan, self.train_dataset, self.share, deterministic=off)
        self._verified = True

    # Metrics.

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """One evaluation batch: keeps the pairs' metrics for `evaluation_loop`; returns (mean loss, None, None)."""
        parts = [part.on(self.args.device) for part in inputs["parts"]]
        total = torch.zeros((), device=self.args.device)
        for part, counts, _ in self._passes(parts):
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, table, _ = self._loss_and_table(model, part, self._eval_totals)
            if counts:
                total += loss * part.pairs
                self._tables.append((part.index, table))
        return total / sum(part.pairs for part in parts), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """transformers' loop; its metrics are replaced by true means, each pair counted once on whatever rank it was."""
        self._tables = []
        data = dataloader.dataset
        self._eval_totals = Totals(len(data), data.mean_chosen_length())
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        index = torch.cat([i for i, _ in self._tables]).to(self.args.device)
        table = torch.cat([t for _, t in self._tables])
        if self.accelerator.num_processes > 1:
            rows = torch.cat([index[:, None].double(), table], dim=1)
            rows = self.accelerator.gather(self.accelerator.pad_across_processes(rows, dim=0, pad_index=-1))
            index, table = rows[:, 0], rows[:, 1:]
        # Ranks that run out of pairs repeat some, and padding has index -1.
        first = {int(i): row for row, i in reversed(list(enumerate(index.tolist()))) if i >= 0}
        names = self._name(metrics.means(table[sorted(first.values())].sum(0)))
        self._count_tokens()
        names["num_tokens"] = self.state.num_input_tokens_seen  # of training, as in TRL
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in names.items()})
        return output

    def _name(self, values: dict[str, float]) -> dict[str, float]:
        """The metrics that this run has."""
        if not self.setup.aux_coef:
            del values["aux_loss"]
        if self.setup.reference == NONE:
            del values["logps/chosen_delta"]
        return values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log and the speed to a training log; sums cross to the host here only.

        Raises ValueError, after the log, where a loss or gradient norm is not finite (see `on_nan`).
        """
        if "train_loss" in logs and self._sums is not None and self.args.logging_strategy != "no":
            self.log({"loss": 0.0})  # of the steps since the last log: a callback stopped the run
        training = "loss" in logs
        if training and self._sums is not None:
            sums = self.accelerator.reduce(self._sums) if self.accelerator.num_processes > 1 else self._sums
            if sums[metrics.COLUMNS.index("pairs")] > 0:
                logs.update(self._name(metrics.means(sums)))
            else:
                del logs["loss"]  # every pair was left out (on_nan="skip")
            self._sums = None
            self._count_tokens()
            logs["num_tokens"] = self.state.num_input_tokens_seen
            logs.update(self.throughput.report(self.setup.flops, self.accelerator))
        super().log(logs, start_time)
        if training:
            self.check_finite(logs)

    def _count_tokens(self) -> None:
        self.state.num_input_tokens_seen += self.throughput.take_tokens()

    def floating_point_ops(self, inputs) -> float:
        """Operations of a micro-batch, forward and backward, for the trainer's total."""
        forests = [part.forest for part in inputs["parts"]]
        return sum(self.setup.flops(f.rows, f.targets.numel(), f.grad_items) for f in forests)
