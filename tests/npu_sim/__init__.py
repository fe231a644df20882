"""Simulated NPUs. A package: its worlds end with its tests."""
