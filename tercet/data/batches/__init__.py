"""From sources to batches of tokens."""
