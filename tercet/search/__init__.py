"""Nearest neighbours among vectors, and an index folder of them."""
