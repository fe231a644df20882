"""Where every rank of a training is, readable from outside; what a hang and a straggler are called."""
