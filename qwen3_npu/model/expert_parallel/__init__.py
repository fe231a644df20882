"""Tokens on their way to the ranks that hold their experts, and back."""
