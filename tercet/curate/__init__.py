"""Making training data: converting, mining, filtering."""
