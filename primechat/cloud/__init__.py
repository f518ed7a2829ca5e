"""Preparation of paid runs: plan, forecast, export and rehearse them."""
