"""Pretraining samples of one or several token files, built with megatron's datasets.

The order of a token file's samples does not depend on the number of samples that is requested. megatron's GPTDataset
shuffles all epochs of a training together, so its order changes with --train-iters. Here the documents and samples of
epoch e are shuffled by (seed, e) alone. The first epoch equals megatron's for a training of one epoch.

The documents of all epochs are concatenated and divided into samples of `sequence_length` tokens (and one more to
predict). A sample belongs to the epoch in which it ends.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from qwen3_npu.args.training import DataArgs
from qwen3_npu.data.train.data_path import blend, cache_folder
from qwen3_npu.data.train.index_cache import IndexCache
from qwen3_npu.data.train.order import Blend
from qwen3_npu.data.train.rows import Rows
from qwen3_npu.data.train.token_file import open_indexed
from qwen3_npu.errors import UsageError


@dataclasses.dataclass(frozen=True)
class _Tokenizer:
    """The attributes of a tokenizer that GPTDataset needs; the data are tokenized already."""

    unique_identifiers: dict[str, str] = dataclasses.field(default_factory=dict)
    vocab_size: int | None = None
    eod: int = -2  # not -1, which is GPTDataset's padding


class TextSamples(Protocol):
    """Samples by number: tokens, labels and loss_mask, each [s]."""

    def __getitem__(self, number: int, /) -> dict[str, torch.Tensor]: ...

    def locate(self, number: int) -> tuple: ...


@dataclasses.dataclass(frozen=True)
class Splits:
    """Samples for training, validation and test; None where there are none."""

    train: TextSamples
    valid: TextSamples | None
    test: TextSamples | None


def build_splits(data: DataArgs, *, seq_length: int, seed: int, samples: tuple[int, int, int]) -> Splits:
    """The datasets. Every rank calls this; rank 0 builds index caches, the others map them, or build what they lack.

    Args:
        samples: number of samples of each split that the training will read.
    """
    if not re.fullmatch(r"\d+(\.\d*)?(,\d+(\.\d*)?){0,2}", data.split) or not any(
        float(x) for x in data.split.split(",")
    ):
        raise UsageError(f"--split {data.split}: three numbers such as 969,30,1 expected")
    prefixes, weights = blend(data.data_path)
    if weights is None and len(prefixes) > 1:
        # Weights are the sizes. megatron has them too, but its blend ends with the first epoch.
        weights = [float(open_indexed(prefix).lengths.sum(dtype=np.int64)) for prefix in prefixes]
    shares = [weight / sum(weights) for weight in weights] if weights else [1.0]
    cache = cache_folder(data)
    made = []
    for prefix, share in zip(prefixes, shares, strict=True):
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend=([prefix], None),
            split=data.split,
            # The name has the data's fingerprint, so a cache is never used for other data.
            path_to_cache=str(cache / open_indexed(prefix).fingerprint()),
            tokenizer=_Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        config.split_matrix = _needed_splits(data.split, config.split_matrix, samples, prefix)
        # A blend takes its share of the samples, and at most one more.
        counts = [count and math.ceil(share * count) + (share < 1) for count in samples]
        made.append(BlendedMegatronDatasetBuilder(TextDataset, counts, lambda: True, config).build())
    if len(made) == 1:
        return Splits(*made[0])
    train, valid, test = (_Blended(sets, shares) if None not in sets else None for sets in zip(*made, strict=True))
    assert train is not None, "a share without documents is refused above"
    return Splits(train, valid, test)


class TextDataset(GPTDataset):
    """megatron's samples in this order. A node that does not see rank 0's index computes the same index."""

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents [epochs x documents]; samples [n + 1, 2], place among them and offset; order of samples [n]."""
        stem = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        cache = IndexCache(Path(self.config.path_to_cache), stem, ("documents", "samples", "order"))
        documents, samples, order = cache.arrays(self._indices)
        return documents, samples, order

    def locate(self, number: int) -> tuple[str, int, int]:
        """The place where sample `number` begins: prefix, document and token."""
        place, offset = self.sample_index[self.shuffle_index[number]]
        return self.dataset.path_prefix, int(self.document_index[place]), int(offset)

    def _indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        from megatron.core.datasets import helpers  # compiled

        length, extra = self.config.sequence_length, self.config.add_extra_token_to_sequence
        per_epoch = self._get_num_tokens_per_epoch()
        epochs = self._get_num_epochs(per_epoch)
        documents, orders = [], []
        for epoch in range(epochs):
            seed = self.config.random_seed
            random = np.random.RandomState(seed if epoch == 0 else [seed, epoch])
            order = np.asarray(self.indices, np.int32).copy()
            random.shuffle(order)
            documents.append(order)
            first, end = (max(n * per_epoch - extra, 0) // length for n in (epoch, epoch + 1))
            samples = np.arange(first, end)
            random.shuffle(samples)
            orders.append(samples)
        every = np.concatenate(documents)
        lengths = np.array(self.dataset.sequence_lengths)
        samples = helpers.build_sample_idx(lengths, every, length, epochs, per_epoch, True, extra)
        return every, samples, np.concatenate(orders)


class _Blended:
    """The samples of several data sets in proportion to their weights."""

    def __init__(self, datasets: Sequence[TextSamples], weights: Sequence[float]) -> None:
        self.datasets, self.order = datasets, Blend(weights)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        chosen = self.order[number]
        return self.datasets[chosen.source][chosen.number]

    def locate(self, number: int) -> tuple[str, int, int]:
        """As `TextDataset.locate`."""
        chosen = self.order[number]
        return self.datasets[chosen.source].locate(chosen.number)


def _needed_splits(
    text: str, matrix: Sequence[tuple[float, float] | None], samples: Sequence[int], prefix: str
) -> list[tuple[float, float] | None]:
    """The splits from which samples are drawn; None for the others.

    megatron-core loops forever over a split without documents, so such a split must never reach it.

    Raises:
        UsageError: a share that is drawn from is 0 or has no document.
    """
    needed: list[tuple[float, float] | None] = []
    count = len(open_indexed(prefix))
    for name, share, wanted in zip(("training", "validation", "test"), matrix, samples, strict=True):
        needed.append(share if wanted else None)
        if wanted and (share is None or round(share[0] * count) == round(share[1] * count)):
            advice = "; give another --split or --eval-iters 0" if name == "validation" else "; give another --split"
            raise UsageError(f"--split {text} leaves no document of {prefix} ({count}) for {name}{advice}")
    return needed


def batched(samples: Sequence[dict[str, torch.Tensor]]) -> list[np.ndarray]:
    """tokens, labels [b, s] int64 and loss_mask [b, s] float32."""
    return [torch.stack([s[key] for s in samples]).numpy() for key in ("tokens", "labels", "loss_mask")]


def plain_rows(samples: Sequence[dict[str, torch.Tensor]]) -> Rows:
    """Samples as rows without regard to documents."""
    tokens, labels, mask = batched(samples)
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    return Rows(
        tokens, labels, mask, positions, cu_seqlens=None, real_tokens=tokens.size, squares=tokens.size * tokens.shape[1]
    )
