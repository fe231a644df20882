"""From raw files of any format to records."""
