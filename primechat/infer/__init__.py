"""Sampled tokens: the engine, the sampler and the calculator."""
