"""Measures of texts, models and conversations."""
