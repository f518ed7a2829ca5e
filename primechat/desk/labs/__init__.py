"""The labs as files: twins and pages; a lab while it runs: its stages and its settings."""
