"""The samples of a token file, epoch after epoch, in an order that does not depend on how many are asked for.

megatron's GPTDataset shuffles all epochs of a training together: with other --train-iters the order is another. Here
epoch e is shuffled by (seed, e) alone, documents and samples; the first epoch is what megatron gives for a single one.

Documents lie one after the other, those of the next epoch behind those of the last, and are cut into samples of
`sequence_length` tokens (and one more to predict); a sample belongs to the epoch that it ends in.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset

from qwen3_npu.data.train.index_cache import IndexCache


class TextDataset(GPTDataset):
    """megatron's samples in this order. A node that does not see rank 0's index makes its own, which is the same."""

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents [epochs x documents]; samples [n + 1, 2], place among them and offset; order of samples [n]."""
        stem = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        cache = IndexCache(Path(self.config.path_to_cache), stem, ("documents", "samples", "order"))
        documents, samples, order = cache.arrays(self._indices)
        return documents, samples, order

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
