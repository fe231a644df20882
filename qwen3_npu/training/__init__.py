"""The training loop: pretraining, fine-tuning and LoRA are the same loop over different data and parameters."""
