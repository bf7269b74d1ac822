"""The trainer, its options, the reference, the optimizer, checkpoints and metrics."""
