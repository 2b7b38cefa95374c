"""Questions written by a model."""
