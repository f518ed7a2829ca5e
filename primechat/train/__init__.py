"""Gradients: the loop, the optimizer, several ranks, and measuring how to run."""
