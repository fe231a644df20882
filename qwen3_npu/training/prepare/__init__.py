"""What is settled before torch is imported: sizes, length, raw data, what the data record."""
