"""Widgets of labs 06 to 08: a shelf of dialogue sets, an adapter's dial, a reply with its distances."""
