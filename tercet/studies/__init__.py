"""Studies: models that differ in one thing each, trained, measured and compared in tables."""
