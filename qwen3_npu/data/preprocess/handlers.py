"""The table of `--handler-name`: what reads a record, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwen3_npu import log
from qwen3_npu.args.preprocess import PreprocessArgs
from qwen3_npu.data.preprocess.handler import Handler
from qwen3_npu.data.preprocess.pretrain_handler import PretrainHandler, TextOf, alpaca_text, sharegpt_text
from qwen3_npu.data.preprocess.record_formats import (
    ALPACA,
    ALPACA_PAIRS,
    OPENAI,
    SHAREGPT,
    SHAREGPT_PAIRS,
    Columns,
    Names,
    alpaca,
    alpaca_pair,
    openai,
    sharegpt,
    sharegpt_pair,
    text_value,
)
from qwen3_npu.data.preprocess.sft_handler import ConversationHandler, InstructionHandler, PairwiseHandler, Style
from qwen3_npu.data.text.prompt_types import open_template, warn_of_misfit
from qwen3_npu.data.text.tokenizer import TokenizerFolder
from qwen3_npu.errors import UsageError

Make = Callable[[PreprocessArgs, TokenizerFolder], Handler]


def _pretrain(text_of: TextOf, columns: tuple[str, ...] = ()) -> Make:
    def make(args: PreprocessArgs, tokenizer: TokenizerFolder) -> Handler:
        for flag, value in (("--prompt-type", args.instruction.prompt_type), ("--map-keys", args.records.map_keys)):
            if value is not None:
                raise UsageError(f"{flag} is for conversations; {args.records.handler_name} takes plain text")
        if args.instruction.pack:
            raise UsageError(
                f"--pack is for conversations; training cuts the documents of {args.records.handler_name} into samples"
            )
        if args.instruction.seq_length is not None:
            log.info("--seq-length: no effect on documents of plain text; training cuts them into samples")
        eod = tokenizer.eos() if args.tokenizer.append_eod else None
        return PretrainHandler(text_of, args.records.json_keys, columns or args.records.json_keys, eod)

    return make


def _conversations(
    kind: type[ConversationHandler],
    read: Callable[[Mapping[str, Any], Columns], Any],
    names: Names,
    has_tags: bool = False,
) -> Make:
    def make(args: PreprocessArgs, tokenizer: TokenizerFolder) -> Handler:
        chosen = args.instruction
        if chosen.prompt_type is None:
            raise UsageError(f"{args.records.handler_name} needs --prompt-type auto, qwen3, qwen or hf")
        if kind is PairwiseHandler and chosen.pack:
            raise UsageError(f"--pack: the pairs of {args.records.handler_name} are not packed")
        warn_of_misfit(chosen.prompt_type, tokenizer)
        style = Style(
            open_template(chosen.prompt_type, tokenizer),
            chosen.thinking,
            None if chosen.seq_length is None else chosen.seq_length - 1,
            chosen.overlong == "cut",
            tokenizer.eos() if args.tokenizer.append_eod and kind is InstructionHandler else None,
        )
        return kind(read, Columns(names, args.records.mapping(), has_tags=has_tags), style)

    return make


HANDLERS: dict[str, Make] = {
    "GeneralPretrainHandler": _pretrain(text_value),
    "AlpacaPretrainHandler": _pretrain(alpaca_text, ("instruction", "input", "output")),
    "SharegptPretrainHandler": _pretrain(sharegpt_text),
    "AlpacaStyleInstructionHandler": _conversations(InstructionHandler, alpaca, ALPACA),
    "SharegptStyleInstructionHandler": _conversations(InstructionHandler, sharegpt, SHAREGPT, has_tags=True),
    "OpenAIInstructionHandler": _conversations(InstructionHandler, openai, OPENAI),
    "AlpacaStylePairwiseHandler": _conversations(PairwiseHandler, alpaca_pair, ALPACA_PAIRS),
    "SharegptStylePairwiseHandler": _conversations(PairwiseHandler, sharegpt_pair, SHAREGPT_PAIRS, has_tags=True),
}
