"""Instruments of the labs: what joins a model, the measures of it and the views of them."""
