"""Flags of `preprocess_data.py`."""

from __future__ import annotations

import dataclasses
import typing

from qwen3_npu.cli import Foreign, flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputArgs:
    """what to read"""

    input: list[str] = flag(
        metavar="PATH",
        help="files, folders or patterns of .jsonl .json .parquet .arrow .csv .txt, WikiText's .tokens (.gz or .zst "
        "may follow), or the name of a Hugging Face dataset",
    )
    handler_name: str | None = flag(None, metavar="NAME", help="what the records are; see the list below")
    json_keys: list[str] = flag(["text"], metavar="KEY", help="columns of pretraining text; each gives its own files")
    hf_datasets_params: str | None = flag(
        None, metavar="FILE", help="JSON file of arguments for datasets.load_dataset (path, name, split, ..)"
    )
    max_samples: int | None = flag(None, minimum=1, unit="records", help="read only so many; default: all")
    max_bad_records: int = flag(
        0, minimum=0, unit="records", help="how many broken records to leave out (each is reported) before stopping"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerArgs:
    """tokens"""

    tokenizer_name_or_path: str | None = flag(
        None, metavar="DIR", names=("--tokenizer-model",), help="folder of the tokenizer (a downloaded Qwen3 model)"
    )
    tokenizer_backend: str = flag(
        "auto", choices=["auto", "fastokens", "tokenizers"], help="library; auto: the fastest that gives right tokens"
    )
    append_eod: bool = flag(False, help="end each document with the tokenizer's eos_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputArgs:
    """what to write"""

    output_prefix: str = flag(metavar="PREFIX", help="start of the output's names: <prefix>_text_document.bin, ..")
    workers: int | None = flag(None, minimum=1, unit="threads", help="work at once; the output is the same for any")
    log_interval: int = flag(1000, minimum=1, unit="records", help="between progress lines, at most one in 10 s")
    resume: bool = flag(False, help="go on with a run that was killed, after its last finished part")


_TRAINING = "training pads the vocabulary"
_STREAM = "inputs are always read as streams, nothing is cached"
_TOKENIZER = "--tokenizer-name-or-path is all it takes"

FOREIGN: dict[str, Foreign] = {
    "--tokenizer-type": Foreign(
        "Hugging Face tokenizers only", nargs=1, only=("PretrainedFromHF", "HuggingFaceTokenizer")
    ),
    "--tokenizer-not-use-fast": Foreign("tokens are the same either way"),
    "--vocab-file": Foreign(_TOKENIZER, nargs=1),
    "--merge-file": Foreign(_TOKENIZER, nargs=1),
    "--make-vocab-size-divisible-by": Foreign(_TRAINING, nargs=1),
    "--pad-vocab-size-to": Foreign(_TRAINING, nargs=1),
    "--dataset-impl": Foreign("there is one format of output", nargs=1, only=("mmap",)),
    "--streaming": Foreign(_STREAM),
    "--cache-dir": Foreign(_STREAM, nargs=1),
    "--overwrite-cache": Foreign(_STREAM),
}


class PreprocessArgs(typing.NamedTuple):
    """The groups of flags."""

    input: InputArgs
    tokenizer: TokenizerArgs
    output: OutputArgs


GROUPS = tuple(typing.get_type_hints(PreprocessArgs).values())
