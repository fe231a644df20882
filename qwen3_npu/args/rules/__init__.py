"""What flags mean together: which fit, which need another, which may change when a training is resumed."""
