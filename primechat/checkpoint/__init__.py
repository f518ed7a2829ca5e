"""Models on disk: nanochat's formats, checkpoints, run directories and the registry of models."""
