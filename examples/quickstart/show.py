"""Show what a training did: a loss curve as PNG, and a line that transformers generates from the result."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from transformers import AutoModelForCausalLM, AutoTokenizer

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.jsonl of the training")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the result")
    parser.add_argument("--curve", type=Path, required=True, help="PNG to write")
    parser.add_argument("--prompt", required=True, help="what the generated line begins with")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.metrics.read_text().splitlines()]
    curve = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    pyplot.figure(figsize=(7, 4))
    pyplot.plot(*zip(*curve, strict=True))
    pyplot.xlabel("step")
    pyplot.ylabel("loss")
    pyplot.grid(alpha=0.3)
    pyplot.savefig(args.curve, dpi=120, bbox_inches="tight")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    inputs = tokenizer(args.prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(f"loss:      {curve[0][1]:.3f} at step {curve[0][0]} -> {curve[-1][1]:.3f} at step {curve[-1][0]}")
    print(f"generated: {tokenizer.decode(output[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
