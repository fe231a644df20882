"""Data: raw files to token files, token files to batches."""
