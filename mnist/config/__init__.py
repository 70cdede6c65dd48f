"""The settings of a run: TrainConfig, the recipes that set it, and the command line made from it."""
