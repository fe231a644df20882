"""`python -m qwen3_npu.ledger RUN_DIR`: where the time of a training went, and what would bring most of it back."""
