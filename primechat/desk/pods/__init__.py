"""Runs elsewhere: plan, export, rehearse, preflight, pull; and what a script has there."""
