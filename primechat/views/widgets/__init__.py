"""Widgets: a .py for the state, a .js that draws it and a .css that styles it, all with the same stem."""
