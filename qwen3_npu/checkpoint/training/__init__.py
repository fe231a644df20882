"""Save and load a training: weights, optimizer, random state, position."""
