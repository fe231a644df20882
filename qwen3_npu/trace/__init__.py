"""One rank's real training step on tensors without data: bytes, operations and collectives of a job of any size."""
