"""Filtering of pairs."""
