"""Raw files in --data-path: preprocessed once, before the processes join. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qwen3_npu.args.preprocess import CheckArgs, InputArgs, OutputArgs, PreprocessArgs
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.args.training import DATA_KINDS
from qwen3_npu.data.preprocess.cache import is_hub_name, is_raw, prepare_data_path
from qwen3_npu.data.train.data_path import blend
from qwen3_npu.errors import UsageError
from qwen3_npu.lease import Lease


def raw_words(args: PretrainArgs) -> list[str]:
    """The words of --data-path that are files, folders or patterns of raw data, or data sets of the Hub."""
    takes_names = args.record.handler_name is not None
    return [word for word in blend(args.data.data_path)[0] if is_raw(word, takes_names=takes_names)]


def prepared(args: PretrainArgs) -> PretrainArgs:
    """The same arguments with prefixes of prepared data in --data-path.

    Each process calls this before it joins the others, so no collective waits for it. One process does the work under a
    lease of the cache; the others use its result.

    Raises:
        UsageError: as preprocess_data.py.
    """
    raw = raw_words(args)
    if not raw:
        return args
    name = args.record.handler_name
    if name is None and (args.data.is_instruction or args.data.is_preference):
        raise UsageError(f"--data-path {raw[0]} is raw data; give --handler-name to say what its records are")
    if name is None or ":" not in name:  # a user's own handler defines its outputs
        _check_handler(args, name or "GeneralPretrainHandler")
    recipe = PreprocessArgs(
        InputArgs(input=raw), args.record, args.tokenizer, args.instruction, output=OutputArgs(), check=CheckArgs()
    )
    beside = Path() if is_hub_name(raw[0]) else Path(raw[0]).parent
    cache = Path(args.data.data_cache_path or beside / "cache")
    remedy = f"give {'another ' if args.data.data_cache_path else ''}--data-cache-path"
    with Lease(cache / ".lease", f"the data cache {cache}", remedy, wait=True):
        words = prepare_data_path(args.data.data_path, recipe, cache)
    return args._replace(data=dataclasses.replace(args.data, data_path=words, data_cache_path=str(cache)))


def _check_handler(args: PretrainArgs, name: str) -> None:
    """Raises: UsageError: the handler's output does not fit the --stage."""
    kinds = {"Pairwise": "pairs", "Kto": "labelled answers", "Pretrain": "text"}
    made = next((kind for word, kind in kinds.items() if word in name), "instruction data")
    if made != args.data.kind:
        stages = ", ".join(f"{kind}: {stage}" for kind, stage in DATA_KINDS.items())
        raise UsageError(f"--handler-name {name} makes {made}; this training reads {args.data.kind} ({stages})")
