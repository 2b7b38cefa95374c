"""What one training step minimises: the only code that sees both the embedder and the batch."""
