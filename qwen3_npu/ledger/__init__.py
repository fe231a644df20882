"""`python -m qwen3_npu.ledger RUN_DIR`: the time of a training by phase, and the largest possible saving."""
