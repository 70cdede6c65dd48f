"""Logs metrics to metrics.jsonl, W&B and other trackers."""
