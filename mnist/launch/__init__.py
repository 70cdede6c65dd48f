"""From launch to exit code: processes, devices, signals and output streams."""
