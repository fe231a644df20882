"""`inference.py --task score`: what a reward model gives answers."""
