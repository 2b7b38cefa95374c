"""Many sets at once."""
