"""Numbers about text, models and talk."""
