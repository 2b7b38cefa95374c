"""Measures of an embedder on one set."""
