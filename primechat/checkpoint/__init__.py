"""Models on disk: nanochat's formats, checkpoints, a run's directory, the registry of models."""
