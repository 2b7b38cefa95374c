"""How good an embedder is, against a baseline, with intervals."""
