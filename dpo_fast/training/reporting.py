"""`Reporting`: the metrics of training and evaluation, as true means over pairs and tokens, whatever the batches and ranks.

It is the part of `DPOTrainer` (trainer.py) between the loss of a batch (batch_loss.py) and what is logged; the columns of a
table of metrics are in metrics.py.
"""

import torch

from . import metrics
from .batch_loss import BatchLoss, Totals
from .ref_model import NONE


class Reporting(BatchLoss):
    """A trainer's metrics; the subclass sets `throughput`, `_sums`, `_aux_loss`, `_tables` and `_eval_totals`."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluate one batch: keep the pairs' metrics for `evaluation_loop` and return (mean loss, None, None)."""
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
        """Run transformers' loop and replace its metrics by true means, in which each pair counts once, on whatever rank."""
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
        # Ranks that run out of pairs repeat some of them, and padding has index -1.
        first = {int(i): row for row, i in reversed(list(enumerate(index.tolist()))) if i >= 0}
        names = self._name(metrics.means(table[sorted(first.values())].sum(0)))
        self._count_tokens()
        names["num_tokens"] = self.state.num_input_tokens_seen  # tokens of training, as in TRL
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in names.items()})
        return output

    def _name(self, values: dict[str, float]) -> dict[str, float]:
        """`values` without the metrics that this run does not have."""
        if not self.setup.aux_coef:
            del values["aux_loss"]
        if self.setup.reference == NONE:
            del values["logps/chosen_delta"]
        return values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log and the speed to a training log; sums cross to the host here only.

        Raises ValueError, after the log, where a loss or gradient norm is not finite (see `on_nan`).
        """
        if "train_loss" in logs and self._sums is not None and self.args.logging_strategy != "no":
            self.log({"loss": 0.0})  # log the steps since the last log: a callback has stopped the run
        training = "loss" in logs
        if training and self._sums is not None:
            sums = self.accelerator.reduce(self._sums) if self.accelerator.num_processes > 1 else self._sums
            if sums[metrics.COLUMNS.index("pairs")] > 0:
                logs.update(self._name(metrics.means(sums)))
                self._aux_loss = logs.get("aux_loss")
            else:
                del logs["loss"]  # every pair was left out (on_nan="skip")
            self._sums = None
            self._count_tokens()
            logs["num_tokens"] = self.state.num_input_tokens_seen
            logs.update(self.throughput.report(self.setup.flops, self.accelerator))
        if "train_loss" in logs and self._aux_loss is not None:
            logs["aux_loss"] = self._aux_loss
        super().log(logs, start_time)
        if training:
            self.check_finite(logs)

    def _count_tokens(self) -> None:
        self.state.num_input_tokens_seen += self.throughput.take_tokens()
