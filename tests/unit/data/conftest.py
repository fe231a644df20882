"""A small tokenizer of Qwen3's kind, and the command as a function."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_npu.data.text.encoder import Encoder, open_encoder
from qwen3_npu.data.text.tokenizer import start_loading

CORPUS = [
    "system user assistant You are a helpful assistant. What is the capital of France? The capital is Paris.",
    "one two three four five six seven eight nine ten, the quick brown fox jumps over the lazy dog.",
    "北京是中国的首都。def f(x): return x + 1\n\n# Tools you may call",
]
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE tokenizer folder with Qwen's normaliser, splitting rule and special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    for token in SPECIAL:
        added = AddedToken(token, special=token.startswith("<|"), normalized=False)
        (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def real_encoder(real_data: Path) -> Encoder:
    """Qwen3's tokenizer, loaded once."""
    return open_encoder(start_loading(str(real_data / "qwen3-tokenizer")))


@pytest.fixture(scope="session")
def real_transformers(real_data: Path) -> Any:
    """Qwen3's tokenizer in transformers, loaded once."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_data / "qwen3-tokenizer")


@pytest.fixture
def run(tiny_tokenizer: str) -> Callable[..., int]:
    """`preprocess_data.py` in this process: run("--flag", value, ...)."""
    from qwen3_npu import cli
    from qwen3_npu.args.preprocess import FOREIGN, GROUPS, PreprocessArgs
    from qwen3_npu.data.preprocess.run import preprocess

    def command(*argv: object) -> int:
        words = [str(word) for word in argv]
        if not any(word.startswith("--tokenizer-name-or-path") for word in words):
            words += ["--tokenizer-name-or-path", tiny_tokenizer]
        parsed = cli.parse("preprocess_data.py", "", GROUPS, FOREIGN, argv=words)
        return preprocess(PreprocessArgs(*parsed.groups))

    return command


@pytest.fixture
def documents() -> Callable[[object], list[list[int]]]:
    """The documents of a prefix, as megatron reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    def read(prefix: object) -> list[list[int]]:
        dataset = IndexedDataset(os.fspath(prefix))
        assert list(dataset.document_indices) == list(range(len(dataset) + 1))
        return [dataset[i].tolist() for i in range(len(dataset))]

    return read
