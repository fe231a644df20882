"""Flags of `preprocess_data.py`."""

from __future__ import annotations

import dataclasses
import json
import typing

from qwen3_npu.cli import Foreign, flag
from qwen3_npu.errors import UsageError

TEXT_HANDLER = "GeneralPretrainHandler"
HANDLER_NAMES = (
    TEXT_HANDLER,
    "AlpacaPretrainHandler",
    "SharegptPretrainHandler",
    "AlpacaStyleInstructionHandler",
    "SharegptStyleInstructionHandler",
    "OpenAIInstructionHandler",
    "AlpacaStylePairwiseHandler",
    "SharegptStylePairwiseHandler",
    "AlpacaStyleKtoHandler",
    "SharegptStyleKtoHandler",
    "OpenAIKtoHandler",
)
THINKING = {"true": True, "false": False, "none": None}


def key_mapping(text: str | None) -> dict[str, object]:
    """--map-keys as a value.

    Raises:
        UsageError: it is no JSON object.
    """
    try:
        keys = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(f"--map-keys {text}: not JSON: {error}; quote it with '..' in a shell") from None
    if not isinstance(keys, dict):
        raise UsageError(f'--map-keys {text}: an object is expected, such as {{"prompt": "question"}}')
    return keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputArgs:
    """what to read"""

    input: list[str] = flag(
        metavar="PATH",
        help="files, folders or patterns of .jsonl .json .parquet .arrow .csv .txt, WikiText's .tokens (.gz or .zst "
        "may follow), or the name of a Hugging Face dataset; with --merge-group-keys a folder of .bin/.idx pairs",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordArgs:
    """what the records are"""

    handler_name: str | None = flag(
        None,
        metavar="NAME",
        help=f"format of the records: {', '.join(HANDLER_NAMES)}, or module:function of your own; default: text "
        f"({TEXT_HANDLER})",
    )
    hf_datasets_params: str | None = flag(
        None, metavar="FILE", help="JSON file of arguments for datasets.load_dataset (path, name, split, ..)"
    )
    json_keys: list[str] = flag(["text"], metavar="KEY", help="columns of pretraining text; each gives its own files")
    map_keys: str | None = flag(
        None,
        metavar="JSON",
        help='names of other columns: \'{"prompt": "question", "query": "", "response": "answer"}\'',
    )
    max_samples: int | None = flag(
        None, minimum=1, unit="records", help="read only this number of records; default: all"
    )
    max_bad_records: int = flag(
        0, minimum=0, unit="records", help="how many broken records to omit (each is reported) before stopping"
    )

    def __post_init__(self) -> None:
        self.mapping()

    def mapping(self) -> dict[str, object]:
        """--map-keys. Raises: UsageError: it is no JSON object."""
        return key_mapping(self.map_keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerArgs:
    """tokens"""

    tokenizer_name_or_path: str | None = flag(
        None, metavar="DIR", names=("--tokenizer-model",), help="folder of the tokenizer (a downloaded Qwen3 model)"
    )
    tokenizer_backend: str = flag(
        "auto",
        choices=["auto", "fastokens", "tokenizers"],
        help="library; auto: the fastest that gives the reference's tokens",
    )
    append_eod: bool = flag(
        False,
        help="end each document with the tokenizer's eos_token; conversations with the "
        "token that ends the template's answers",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionArgs:
    """conversations"""

    prompt_type: str | None = flag(
        None,
        choices=["auto", "qwen", "qwen3", "hf"],
        help="template of conversations: MindSpeed-LLM's template of that name, or the tokenizer's own chat template "
        "(hf); auto: hf if the tokenizer has one, else qwen3",
    )
    enable_thinking: str = flag(
        "none",
        metavar="|".join(THINKING),
        help="empty thoughts of answers without any: true: learned; none: given; false: given, other thoughts removed",
    )
    seq_length: int | None = flag(
        None, minimum=2, unit="tokens", help="samples are shorter than this; packs have this length"
    )
    overlong: str = flag(
        "cut", choices=["cut", "drop"], help="whether longer samples are truncated or omitted; both are counted"
    )
    pack: bool = flag(False, help="join several samples into one of --seq-length tokens")
    neat_pack: bool = flag(False, help="with --pack: keep the boundaries, so that samples do not attend to each other")
    n_subs: int = flag(
        1, minimum=1, unit="subsets", help="with --pack: number of parts of the data that are packed separately"
    )

    def __post_init__(self) -> None:
        if self.pack and self.seq_length is None:
            raise UsageError("--pack needs --seq-length, the length of a pack")
        if self.enable_thinking.lower() not in THINKING:
            raise UsageError(f"--enable-thinking {self.enable_thinking}: it is {', '.join(THINKING)}")
        if self.prompt_type == "qwen" and self.thinking is not None:
            raise UsageError(
                f"--enable-thinking {self.enable_thinking}: --prompt-type qwen knows no thoughts; use qwen3 or drop it"
            )

    def check_packing(self) -> None:
        """Checks for preprocessing; data that are packed already need no --pack. Raises: UsageError."""
        if self.neat_pack and not self.pack:
            raise UsageError("--neat-pack needs --pack")

    @property
    def thinking(self) -> bool | None:
        """--enable-thinking as a value."""
        return THINKING[self.enable_thinking.lower()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputArgs:
    """what to write"""

    output_prefix: str | None = flag(
        None, metavar="PREFIX", help="prefix of the output files: <prefix>_text_document.bin, .."
    )
    merge_group_keys: list[str] | None = flag(
        None, metavar="KEY", help="join all pairs of files in --input whose names hold KEY, to <prefix>_<KEY>"
    )
    workers: int | None = flag(
        None, minimum=1, help="threads; the output does not depend on their number; default: CPUs"
    )
    log_interval: int = flag(1000, minimum=1, help="records between progress lines, at most one in 10 s")
    resume: bool = flag(False, help="continue a run that was interrupted, after its last finished part")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckArgs:
    """checks before writing"""

    check: bool = flag(False, help="write nothing: statistics and warnings")
    show: int = flag(0, minimum=0, unit="samples", help="write nothing: show samples, what is learned in colour")
    strict: bool = flag(False, help="with --check: exit 1 if there is a warning")

    def __post_init__(self) -> None:
        if self.strict and not self.check:
            raise UsageError("--strict says what --check returns; it needs --check")


class PreprocessArgs(typing.NamedTuple):
    """The groups of flags."""

    input: InputArgs
    records: RecordArgs
    tokenizer: TokenizerArgs
    instruction: InstructionArgs
    output: OutputArgs
    check: CheckArgs


GROUPS = tuple(typing.get_type_hints(PreprocessArgs).values())

_TRAINING = "training pads the vocabulary"
_STREAM = "inputs are always read as streams, nothing is cached"
_TOKENIZER = "--tokenizer-name-or-path is enough"
_SENTENCES = "documents are not split into sentences"
_OTHER_MODELS = "Qwen3's templates do not have this"
_LLAMA_FACTORY = "dataset_info.json is not read; give the file as --input, its columns as --map-keys"

FOREIGN: dict[str, Foreign] = {
    "--tokenizer-type": Foreign(
        "Hugging Face tokenizers only", nargs=1, only=("PretrainedFromHF", "HuggingFaceTokenizer")
    ),
    "--tokenizer-not-use-fast": Foreign("tokens are the same either way"),
    "--vocab-file": Foreign(_TOKENIZER, nargs=1),
    "--merge-file": Foreign(_TOKENIZER, nargs=1),
    "--make-vocab-size-divisible-by": Foreign(_TRAINING, nargs=1),
    "--pad-vocab-size-to": Foreign(_TRAINING, nargs=1),
    "--pad-to-multiple-of": Foreign("training pads its batches", nargs=1, only=("1",)),
    "--dataset-impl": Foreign("there is only one output format", nargs=1, only=("mmap",)),
    "--streaming": Foreign(_STREAM),
    "--cache-dir": Foreign(_STREAM, nargs=1),
    "--overwrite-cache": Foreign(_STREAM),
    "--seed": Foreign("samples keep their order; training shuffles with its own --seed", nargs=1),
    "--mix-strategy": Foreign("inputs follow each other", nargs=1, only=("concat",)),
    "--interleave-probs": Foreign(
        "inputs follow each other; training blends with --data-path weights", 1, refused=True
    ),
    "--drop-thinking": Foreign(_OTHER_MODELS, nargs=1),
    "--reasoning-effort": Foreign(_OTHER_MODELS, nargs=1, refused=True),
    "--reward-tokens": Foreign("process reward models are not trained", nargs="+", refused=True),
    "--split-sentences": Foreign(_SENTENCES, refused=True),
    "--keep-newlines": Foreign(_SENTENCES),
    "--prompt-type-path": Foreign("the templates are built in", nargs=1, refused=True),
    "--dataset-dir": Foreign(_LLAMA_FACTORY, nargs=1, refused=True),
    "--dataset-additional-keys": Foreign("outputs hold tokens only", nargs="*", refused=True),
    "--script-data-dir": Foreign("loading scripts are not run", nargs=1, refused=True),
    "--datasets": Foreign("give them all as --input", nargs="+", refused=True),
    "--data-obfuscation": Foreign("tokens are not obfuscated", refused=True),
    "--obf-seed-content": Foreign("tokens are not obfuscated", nargs=1, refused=True),
}
