"""Make a text embedder of your own from any pretrained transformer: train, measure, search."""
