"""Where metrics go: metrics.jsonl, W&B and other trackers."""
