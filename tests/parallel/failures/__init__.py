"""Worlds of processes. A package: its worlds end with its tests."""
