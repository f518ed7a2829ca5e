"""Inference: the engine, the sampler and the calculator."""
