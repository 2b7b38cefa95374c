"""Work in units that are done once, in one process or many."""
