"""Other data sets as training rows."""
