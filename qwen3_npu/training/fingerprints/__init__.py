"""Fingerprints of the tensors of a step, for comparison with another machine or another run."""
