"""A conversation on the console."""
