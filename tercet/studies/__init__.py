"""Which part of a recipe is worth what: the same run with one thing changed at a time."""
