"""`BatchLoss`: how a batch of pairs becomes a loss, under the policy and the reference, with what the metrics need.

It is the half of `DPOTrainer` (trainer.py) that knows the objective; `compute_loss` is the hook that users override.
"""

import dataclasses

import torch

from ..forest.batch import Part
from ..forest.gate import base_model, computes_in_half
from ..forest.paths import wpo_weights
from ..losses import objective
from . import metrics
from .life import RunLife
from .ref_model import CACHED, NONE, as_reference
from .sharding import autocast, passes_together
from .start_checks import check_start


@dataclasses.dataclass
class Totals:
    """What a gradient is a mean over: the pairs of one optimizer step, in all its micro-batches and on all ranks."""

    pairs: torch.Tensor | float
    mean_chosen_length: torch.Tensor | float

    @classmethod
    def of(cls, parts: list[Part]) -> "Totals":
        """The totals of the pairs in `parts` alone."""
        pairs = sum(part.pairs for part in parts)
        return cls(pairs, max(sum(part.chosen_tokens for part in parts), 1) / pairs)


class BatchLoss(RunLife):
    """A trainer's loss; the subclass sets `setup`, `statistics`, `ref_model` and `_started`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: Totals | None = None):
        """The mean loss of the pairs in `inputs`, the hook of transformers' trainers; override it to change the loss.

        Args:
            inputs: `{"parts": [Part, ...]}`; training and evaluation call this once per part, which is one forward pass.
            num_items_in_batch: the totals that the step's gradient is a mean over; None: the pairs of `inputs` alone.

        Returns:
            The loss, a scalar with a gradient, or with `return_outputs` (loss, outputs). `outputs["pair_table"]` [B, columns]
            holds the metrics' sums per pair (metrics.py), the others are `PreferenceOutput`'s fields [B]. An override must
            return the outputs of `super().compute_loss(model, inputs, True, num_items_in_batch)`, changed or not.
        """
        parts = [part.on(self.args.device) for part in inputs["parts"]]
        totals = num_items_in_batch or Totals.of(parts)
        found = [self._part_loss(model, part, totals.mean_chosen_length) for part in parts]
        loss = sum(loss for loss, _ in found) / sum(part.pairs for part in parts)
        if not return_outputs:
            return loss
        return loss, {name: torch.cat([outputs[name] for _, outputs in found]) for name in found[0][1]}

    def _passes(self, parts: list[Part]) -> list[tuple[Part, bool, bool]]:
        """(part, counts, last) equally often on every rank: one with fewer parts repeats its last without counting it."""
        run = [(part, True) for part in parts]
        if self.args.max_tokens_per_batch is not None and self.accelerator.num_processes > 1:
            run = list(passes_together(self.accelerator, parts, parts[-1]))
        return [(part, counts, i == len(run) - 1) for i, (part, counts) in enumerate(run)]

    def _part_loss(self, model, part: Part, mean_chosen_length) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of the pairs' losses, and the outputs that `compute_loss` returns beside it."""
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
        """`compute_loss` of one part (an override's, if there is one), its table with that loss as `loss`, and losses [B]."""
        loss, outputs = self.compute_loss(model, {"parts": [part]}, return_outputs=True, num_items_in_batch=totals)
        table = outputs["pair_table"] if isinstance(outputs, dict) and "pair_table" in outputs else None
        if table is None:
            raise ValueError(
                "compute_loss must return (loss, outputs) with the outputs of super().compute_loss(..., "
                "return_outputs=True): the metrics are in them"
            )
        # Terms that this class did not put there (an auxiliary loss, an override's) are spread evenly over the pairs.
        column = metrics.COLUMNS.index("loss")
        losses = table[:, column].clone()
        rest = loss.detach().double() - losses.mean()
        table[:, column] += rest
        # A nan in the loss makes every pair's share of it nan, so the pairs' own losses tell which pair is not finite.
        return loss, table, torch.where(losses.isfinite().all(), losses + rest, losses)

    def reference_logps(self, part: Part) -> torch.Tensor | None:
        """Summed log-probs [2, B] (chosen, rejected) of the part's pairs under the reference, or None without a reference."""
        if self.setup.reference == NONE:
            return None
        if self.setup.reference == CACHED:
            if part.ref_logps is None:
                raise ValueError("these pairs have no reference log-probs: pass them to DPOTrainer, or as rows")
            return part.ref_logps
        model = self.ref_model or self.model_wrapped
        # The policy's autocast is inside accelerate's wrapper, which a second model lacks.
        with as_reference(model, self.ref_model is None), autocast(self.accelerator, self.ref_model is None):
            token_logps = model(forest=part.forest)["token_logps"]
        return part.forest.sum_paths(token_logps, self.args.ld_alpha)

    def compute_ref_log_probs(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen and rejected log-probs [B] of `inputs` under `model` as the reference, without adapters; the name is TRL's."""
        adapters = model is self.model and hasattr(model, "disable_adapter")
        found = []
        with as_reference(model, adapters), autocast(self.accelerator, model is not self.ref_model):
            for part in inputs["parts"]:
                forest = part.on(self.args.device).forest
                found.append(forest.sum_paths(model(forest=forest)["token_logps"], self.args.ld_alpha))
        chosen, rejected = torch.cat(found, dim=1)
        return chosen, rejected

    def _check_start(self, result) -> None:
        """Warn where policy and reference differ before the very first step, when they should be the same model."""
        if self._started or self.state.global_step or self.setup.reference == NONE or self.setup.foreign_reference:
            return
        if self.model.training:
            low = self.accelerator.mixed_precision != "no" or computes_in_half(base_model(self.model))
            check_start(result.chosen_rewards, result.rejected_rewards, low)
