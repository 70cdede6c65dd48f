"""Settings of a run: TrainConfig, recipes and the command line."""
