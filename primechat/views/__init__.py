"""Everything on screen: one theme, plots, and widgets that receive plain data and callbacks."""
