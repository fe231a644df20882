"""The position of every rank of a training, readable from other processes; verdicts on hangs and stragglers."""
