"""A training of two steps of each kind of model: saves a checkpoint, and what the live model then computes.

    python live_training.py MODELS TOKENS OUT

For each KIND in MODELS: OUT/KIND is the checkpoint, OUT/KIND.npy the logits of `TOKENS` in `live_tokens`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(ROOT)]

LIVE_TOKENS = [[7, 11, 13, 17, 19, 23, 29, 31], [2, 4, 8, 16, 32, 64, 128, 249]]
FLAGS = ["--seq-length", "16", "--micro-batch-size", "2", "--train-iters", "2", "--lr", "1e-2", "--device", "cpu"]


def main(models: Path, tokens: Path, out: Path) -> None:
    from qwen3_npu.platform import select_platform

    platform = select_platform("cpu")
    platform.activate()
    import numpy as np
    import torch

    from qwen3_npu.args.parallel import RuntimeArgs
    from qwen3_npu.distributed.launch import process_group
    from qwen3_npu.model.sequence import TokenSequence
    from qwen3_npu.parity.measure import trainer

    kinds = sorted(path.name for path in models.iterdir())
    with process_group(platform, RuntimeArgs()) as world:
        for kind in kinds:
            flags = [*FLAGS, "--load", str(models / kind), "--save", str(out / kind), "--data-path", str(tokens)]
            with trainer(platform, world, flags) as training:
                for _ in range(2):
                    training.step()
                training.saver.save(training.position)
                training.saver.finish()
                ids = torch.tensor(LIVE_TOKENS)
                positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
                sequence = TokenSequence(positions, None, training.plan.arch.rope, training.dtype)
                model = training.modules[0].eval()
                with torch.no_grad():
                    logits = model(ids, positions, None, packed_seq_params=sequence)
                np.save(out / f"{kind}.npy", logits[..., : training.plan.arch.vocab_size].numpy())
    again(out / "moe", out / "resaved")


def again(folder: Path, copy: Path) -> None:
    """The checkpoint as torch.save writes it, with the arguments that Megatron's trainings have besides."""
    import torch
    from megatron.core.transformer.enums import AttnBackend

    content = torch.load(folder / "iter_0000002/mp_rank_00/model_optim_rng.pt", weights_only=False)
    args: argparse.Namespace = content["args"]
    args.attention_backend, args.autocast_dtype, args.config_logger_dir = (
        AttnBackend.auto,
        torch.device("cpu"),
        Path("/x"),
    )
    args.noop_layers, args.lr = set(), 1e-3
    content["rng_state"] = [{"np_rng_state": __import__("numpy").random.get_state()}]
    content["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
    # A parameter that is a part of a larger storage, as with a flat parameter buffer.
    flat = torch.cat([torch.zeros(5), content["model"]["decoder.final_layernorm.weight"].flatten()])
    content["model"]["decoder.final_layernorm.weight"] = torch.nn.Parameter(flat[5:])
    target = copy / "iter_0000002/mp_rank_00/model_optim_rng.pt"
    target.parent.mkdir(parents=True)
    torch.save(content, target)
    (copy / "latest_checkpointed_iteration.txt").write_text("2")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
