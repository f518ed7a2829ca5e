"""Models: token ids to logits and losses, their weights, and adapters."""
