"""Before money is spent: plan a run, forecast it, export it, rehearse it."""
