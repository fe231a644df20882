#!/usr/bin/env python3
"""MindSpeed-LLM's name for fine-tuning; here pretrain_gpt.py trains in every way."""

from pretrain_gpt import cli, main

if __name__ == "__main__":
    cli.run("posttrain_gpt.py", main)
