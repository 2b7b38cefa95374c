"""What a search engine is."""
