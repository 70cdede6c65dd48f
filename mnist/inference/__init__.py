"""Use a trained model: classify images and handwriting, serve the drawing page, export to ONNX."""
