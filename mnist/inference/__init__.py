"""A trained model applied: to images, to handwriting, on the page to draw on, as an exported file."""
