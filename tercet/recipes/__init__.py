"""One file for each method: numbers and names of parts, no loops."""
