"""Training: the loop, the optimizer, several ranks, and the choice of device and precision."""
