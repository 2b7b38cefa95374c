"""Files that appear whole or not at all, records, arrays, and progress."""
