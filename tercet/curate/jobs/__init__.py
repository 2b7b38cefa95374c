"""Jobs in units of work that are done once, in one process or many."""
