"""From files to batches: data sets, folders of images, the cache of decoded ones, transforms, the loader."""
