"""Models that come inside Python packages."""
