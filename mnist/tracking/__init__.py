"""Log metrics to metrics.jsonl, W&B and other trackers (trackers.py)."""
