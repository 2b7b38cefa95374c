"""Conversion of other data sets to training rows, and removal of test texts from them."""
