"""From files to batches: datasets, folders of images and their cache, transforms, and the loader (loader.py)."""
