"""The engine that scans folders."""
