"""Fast encoding on CPUs."""
