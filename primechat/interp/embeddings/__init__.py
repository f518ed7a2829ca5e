"""Embeddings: the tables of a model, pictures of them, and how far a picture lies."""
