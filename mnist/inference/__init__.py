"""Use a trained model: predict images and handwriting, draw on a page, export."""
