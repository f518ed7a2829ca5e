"""Text to token ids to batches; `batches` alone imports torch at import time."""
