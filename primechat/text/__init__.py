"""Characters to integers to batches; only `batches` imports torch."""
