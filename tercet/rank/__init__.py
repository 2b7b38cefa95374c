"""Scores, the best of them, and rankings by several kinds of vectors."""
