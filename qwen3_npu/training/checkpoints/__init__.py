"""The checkpoints of a training and the Hugging Face directories beside them."""
