"""Widgets of the tokenizer playground."""
