"""Embedders: networks with their tokenizers and settings, which turn texts into vectors."""
