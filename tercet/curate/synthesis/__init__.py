"""Training examples whose questions a language model writes."""
