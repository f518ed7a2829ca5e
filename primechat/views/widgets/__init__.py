"""Widgets: a .py for the state, a .js that draws it, a .css for its looks, all of one stem."""
