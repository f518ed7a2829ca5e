"""Integers to logits and losses, and weights on disk."""
