"""Losses, optimizers, evaluation, progress, checkpoints and profiling."""
