"""A run's folder: written while it trains, and read back."""
