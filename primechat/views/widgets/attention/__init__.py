"""The views of a forward pass: heads, switches, the stream, scores."""
