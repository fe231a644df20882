"""From conversations and texts to token ids."""
