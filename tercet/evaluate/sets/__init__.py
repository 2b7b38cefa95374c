"""Sets to evaluate on."""
