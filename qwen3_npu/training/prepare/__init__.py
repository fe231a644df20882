"""Preparation before torch is imported: sizes, length, raw data, records of the data."""
