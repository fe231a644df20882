"""--verify: what a conversion should have written, by code that conversions do not use."""
