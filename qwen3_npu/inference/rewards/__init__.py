"""`inference.py --task score`: rewards of answers by a reward model."""
