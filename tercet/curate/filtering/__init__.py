"""Filtering of pairs: rules that need no model, and the rank of a document for its query."""
