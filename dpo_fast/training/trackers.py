"""Trackers that write files are pointed to the output folder, unless their own setting names another place."""

import os

# report_to -> the tracker's own environment variable, and the folder below output_dir
_VARIABLES = {
    "wandb": ("WANDB_DIR", ""),
    "mlflow": ("MLFLOW_TRACKING_URI", "mlruns"),
    "swanlab": ("SWANLAB_LOG_DIR", "swanlog"),
}


def write_below(trainer) -> None:
    """Point the trackers of `trainer` to its output folder. Call it before the first log, which an evaluation may write."""
    folder = os.path.abspath(trainer.args.output_dir)
    for name in trainer.args.report_to:
        if name in _VARIABLES:
            variable, place = _VARIABLES[name]
            os.environ.setdefault(variable, os.path.join(folder, place).rstrip(os.sep))
    for callback in trainer.callback_handler.callbacks:
        # TensorBoard's callback names its folder when training begins; an earlier log would go to ./runs.
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = os.path.join(folder, "runs")
