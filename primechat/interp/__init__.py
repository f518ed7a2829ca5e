"""Looking into a model: hooks on its forward pass, circuits of heads, the geometry of its embeddings."""
