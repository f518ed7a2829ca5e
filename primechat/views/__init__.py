"""What a person looks at: one theme, plots, and widgets that get plain data and functions to call."""
