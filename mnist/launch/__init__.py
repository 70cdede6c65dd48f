"""Processes, devices, signals and output streams, from launch to exit code."""
