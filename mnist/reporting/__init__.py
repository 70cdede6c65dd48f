"""The terminal output, plots and report page of a run."""
