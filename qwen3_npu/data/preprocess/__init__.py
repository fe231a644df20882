"""From records to token files."""
