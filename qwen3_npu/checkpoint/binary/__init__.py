"""Bytes on disk: dtypes and torch's zip files. Knows no model."""
