"""Weights on disk: Hugging Face directories, Megatron checkpoints, and the table that joins them."""
