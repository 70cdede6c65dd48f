"""Losses, optimizers and schedules, evaluation, progress (steps, epochs), checkpoints and profiling."""
