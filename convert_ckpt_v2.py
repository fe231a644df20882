#!/usr/bin/env python3
"""MindSpeed-LLM's newer name for convert_ckpt.py."""

from convert_ckpt import cli, main

if __name__ == "__main__":
    cli.run("convert_ckpt_v2.py", main)
