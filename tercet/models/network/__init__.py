"""Tensors in, tensors out: attention, the backbone, pooling, and the embedder made of them."""
