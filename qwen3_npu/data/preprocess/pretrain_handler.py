"""Handlers for pretraining: the text of a record becomes one document per output."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qwen3_npu.data.preprocess.handler import BlockSummary, Prepared
from qwen3_npu.data.preprocess.record_formats import text_value, value
from qwen3_npu.data.read.blocks import BadRecord, RecordBlock, parse_block
from qwen3_npu.data.text.encoder import Tokens

# (record, column) -> text. It raises ValueError.
TextOf = Callable[[Mapping[str, object], str], str]

# MindSpeed-LLM's text of an Alpaca record, letter by letter ("###None" where there is no input, too).
_ALPACA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
    "USER: Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n###{input}\n\n### Response: ASSISTANT: {output}"
)


def alpaca_text(record: Mapping[str, object], column: str) -> str:
    """An instruction, its input and the answer as one text."""
    given = record.get("input")
    return _ALPACA.format(
        instruction=text_value(record, "instruction"),
        input=f" Input:\n{given}" if given else None,
        output=text_value(record, "output"),
    )


def sharegpt_text(record: Mapping[str, object], column: str) -> str:
    """All messages of a conversation, one after the other."""
    messages = value(record, column)
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"column {column!r} is not a list of messages")
    return "".join(text_value(m, "value" if m.get("value") is not None else "content") for m in messages)


class PretrainHandler:
    """Documents of text columns; empty texts give none."""

    def __init__(self, text_of: TextOf, keys: Sequence[str], columns: Sequence[str], eod: int | None) -> None:
        """
        Args:
            keys: columns to take, each its own output.
            eod: token that ends each document, if any.
        """
        self.text_of, self.outputs, self.columns, self.eod = text_of, keys, columns, eod

    def prepare(self, block: RecordBlock) -> Prepared:
        """The non-empty texts, grouped by output; the layout is the number of texts in each group."""
        records, bad = parse_block(block)
        texts: dict[str, list[str]] = {key: [] for key in self.outputs}
        for number, record in records:
            try:
                row = [self.text_of(record, key) for key in self.outputs]
            except ValueError as error:
                bad.append(BadRecord(block.file, number, str(error)))
                continue
            for key, text in zip(self.outputs, row, strict=True):
                texts[key].append(text)
        filled = [[text for text in texts[key] if text] for key in self.outputs]
        layout, together = [len(part) for part in filled], list(itertools.chain.from_iterable(filled))
        counts = Counter({"empty texts left out": sum(map(len, texts.values())) - len(together)})
        bad.sort(key=lambda b: b.number)
        return Prepared(together, layout, BlockSummary(len(block.numbers), counts, bad))

    def documents(self, prepared: Prepared, tokens: Tokens) -> Mapping[str, Tokens]:
        """Each text, with the end-of-document token if there is one."""
        tokens = _ended(tokens, self.eod)
        texts = np.cumsum([0, *prepared.layout])
        boundaries = np.concatenate(([0], np.cumsum(tokens.lengths, dtype=np.int64)))[texts]
        return {
            key: Tokens(tokens.ids[boundaries[i] : boundaries[i + 1]], tokens.lengths[texts[i] : texts[i + 1]])
            for i, key in enumerate(self.outputs)
        }


def _ended(tokens: Tokens, eod: int | None) -> Tokens:
    """The documents, each followed by `eod`."""
    if eod is None or not len(tokens.lengths):
        return tokens
    lengths = tokens.lengths + 1
    ends = np.cumsum(lengths, dtype=np.int64) - 1
    is_text = np.ones(len(tokens.ids) + len(lengths), bool)
    is_text[ends] = False
    ids = np.empty(len(is_text), np.int32)
    ids[is_text] = tokens.ids
    ids[ends] = eod
    return Tokens(ids, lengths)
