"""Embeddings: the tables of a model, pictures of them, and how much a picture distorts."""
