"""Intervals, figures and reports."""
