"""Tensor parallelism whose communication hides behind products: products.py computes, linears.py holds the weights."""
