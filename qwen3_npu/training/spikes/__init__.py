"""Steps whose loss or gradient norm leaps, and weights that silently differ: noticed, left out, gone back from."""
