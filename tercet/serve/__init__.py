"""A server of vectors and of search over HTTP."""
