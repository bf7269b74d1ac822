"""The output of a run: one readable line per log, and bars on a terminal. Trackers and the log history get everything."""

from transformers import PrinterCallback, ProgressCallback

# name in the log -> (word on the screen, format)
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("margin", "{:.4f}"),
    "rewards/accuracies": ("accuracy", "{:.1%}"),
    "perf/tokens_per_second": ("tokens/s", "{:,.0f}"),
}


def log_line(logs: dict, step: int, steps: int) -> str | None:
    """ "step 10/100: loss 0.6931, margin 0.0000, accuracy 50.0%, tokens/s 1,234"; None for the summary at the end.

    An evaluation's line begins with its name ("eval", "eval_helpful").
    """
    if "train_loss" in logs:
        return None
    prefix = next(
        (name.removesuffix("_loss") for name in logs if name.endswith("_loss") and "aux_loss" not in name), ""
    )
    found = [
        f"{word} {form.format(logs[key])}"
        for name, (word, form) in _SHOWN.items()
        if (key := f"{prefix}_{name}" if prefix else name) in logs
    ]
    if not found:
        return None
    place = f"step {step}/{steps}" if steps else f"step {step}"
    return f"{place}{', ' + prefix if prefix else ''}: {', '.join(found)}"


class LinePrinter(PrinterCallback):
    """Print one line per log on stdout, without bars."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = log_line(logs, state.global_step, state.max_steps)
        if state.is_world_process_zero and line:
            print(line, flush=True)


class LineProgress(ProgressCallback):
    """Print one line per log above the bar; an evaluation before training has a bar too."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = log_line(logs, state.global_step, state.max_steps)
        if state.is_world_process_zero and line:
            if self.training_bar is not None:
                self.training_bar.write(line)
            else:
                print(line, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def use_lines(trainer) -> None:
    """Replace transformers' callbacks by these; a notebook's table and a user's own callbacks stay."""
    for theirs, ours in ((PrinterCallback, LinePrinter), (ProgressCallback, LineProgress)):
        if any(type(callback) is theirs for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(theirs)
            trainer.add_callback(ours)
