"""What the launcher started: processes, devices and signals, from the start to the exit code."""
