"""Embedders: a network, its settings, and texts to vectors."""
