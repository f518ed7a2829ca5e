"""Interpretability: hooks on the forward pass, circuits of heads, the geometry of embeddings."""
