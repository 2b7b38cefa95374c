"""Networks from packed tokens to vectors: attention, backbone, trained layer, pooling, heads."""
