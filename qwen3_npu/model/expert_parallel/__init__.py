"""The exchange of tokens with the ranks that hold their experts."""
