"""The table of `--handler-name`: which function reads a record, and which tokens it gives."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ParamSpec, TypeVar

from qwen3_npu import log
from qwen3_npu.args.preprocess import PreprocessArgs
from qwen3_npu.data.preprocess.handler import Handler
from qwen3_npu.data.preprocess.pretrain_handler import PretrainHandler, TextOf, alpaca_text, sharegpt_text
from qwen3_npu.data.preprocess.record_formats import (
    ALPACA,
    ALPACA_KTO,
    ALPACA_PAIRS,
    OPENAI,
    OPENAI_KTO,
    SHAREGPT,
    SHAREGPT_KTO,
    SHAREGPT_PAIRS,
    ColumnNames,
    Columns,
    alpaca,
    alpaca_pair,
    judged,
    openai,
    sharegpt,
    sharegpt_pair,
    text_value,
)
from qwen3_npu.data.preprocess.sft_handler import (
    ConversationHandler,
    InstructionHandler,
    KtoHandler,
    PairwiseHandler,
    Style,
)
from qwen3_npu.data.text.prompt_types import open_template, warn_of_misfit
from qwen3_npu.data.text.tokenizer import TokenizerFolder
from qwen3_npu.errors import UsageError, choose

Make = Callable[[PreprocessArgs, TokenizerFolder], Handler]
P = ParamSpec("P")
R = TypeVar("R")


def _pretrain(text_of: TextOf, columns: tuple[str, ...] = ()) -> Make:
    def make(args: PreprocessArgs, tokenizer: TokenizerFolder) -> Handler:
        for flag, value in (("--prompt-type", args.instruction.prompt_type), ("--map-keys", args.records.map_keys)):
            if value is not None:
                raise UsageError(f"{flag} is for conversations; {args.records.handler_name} takes plain text")
        if args.instruction.pack:
            raise UsageError(
                "--pack is for conversations; training divides the documents of "
                f"{args.records.handler_name} into samples"
            )
        if args.instruction.seq_length is not None:
            log.info("--seq-length: no effect on documents of plain text; training divides them into samples")
        eod = tokenizer.eos() if args.tokenizer.append_eod else None
        return PretrainHandler(text_of, args.records.json_keys, columns or args.records.json_keys, eod)

    return make


def conversations(
    kind: type[ConversationHandler],
    read: Callable[[Mapping[str, object], Columns], object],
    names: ColumnNames,
    has_tags: bool = False,
) -> Make:
    """A handler of conversations (`InstructionHandler`), pairs (`PairwiseHandler`) or labelled answers (`KtoHandler`).

    Args:
        read: (record, names of its columns) -> a Conversation, PreferencePair or Judged; raises ValueError with the
            reason for a record that cannot be used.
        names: meanings and columns, for --map-keys; `read` gets a column's value from `Columns.get`.
        has_tags: whether keys and roles of messages have names as in ShareGPT.
    """

    def make(args: PreprocessArgs, tokenizer: TokenizerFolder) -> Handler:
        chosen = args.instruction
        if chosen.prompt_type is None:
            raise UsageError(f"{args.records.handler_name} needs --prompt-type auto, qwen3, qwen or hf")
        if kind is not InstructionHandler and chosen.pack:
            raise UsageError(f"--pack: the answers of {args.records.handler_name} are not packed")
        warn_of_misfit(chosen.prompt_type, tokenizer)
        # As in MindSpeed-LLM, what ends the template's answers ends a sample, whatever eos_token says.
        template, ends = open_template(chosen.prompt_type, tokenizer), kind is InstructionHandler
        style = Style(
            template,
            chosen.thinking,
            None if chosen.seq_length is None else chosen.seq_length - 1,
            chosen.overlong == "cut",
            eod=tokenizer.id(template.end, "--append-eod") if args.tokenizer.append_eod and ends else None,
        )
        return kind(read, Columns(names, args.records.mapping(), has_tags=has_tags), style)

    return make


HANDLERS: dict[str, Make] = {
    "GeneralPretrainHandler": _pretrain(text_value),
    "AlpacaPretrainHandler": _pretrain(alpaca_text, ("instruction", "input", "output")),
    "SharegptPretrainHandler": _pretrain(sharegpt_text),
    "AlpacaStyleInstructionHandler": conversations(InstructionHandler, alpaca, ALPACA),
    "SharegptStyleInstructionHandler": conversations(InstructionHandler, sharegpt, SHAREGPT, has_tags=True),
    "OpenAIInstructionHandler": conversations(InstructionHandler, openai, OPENAI),
    "AlpacaStylePairwiseHandler": conversations(PairwiseHandler, alpaca_pair, ALPACA_PAIRS),
    "SharegptStylePairwiseHandler": conversations(PairwiseHandler, sharegpt_pair, SHAREGPT_PAIRS, has_tags=True),
    "AlpacaStyleKtoHandler": conversations(KtoHandler, judged(alpaca), ALPACA_KTO),
    "SharegptStyleKtoHandler": conversations(KtoHandler, judged(sharegpt), SHAREGPT_KTO, has_tags=True),
    "OpenAIKtoHandler": conversations(KtoHandler, judged(openai), OPENAI_KTO),
}


def maker(name: str) -> Make:
    """The function that makes the handler of `--handler-name`: one of `HANDLERS`, or the user's `module:function`.

    The current folder can be imported from. The function takes (PreprocessArgs, TokenizerFolder) and returns a
    `handler.Handler`; `conversations` makes such functions.

    Raises:
        UsageError: there is none of that name, or its module cannot be imported.
    """
    if ":" not in name:
        return choose(HANDLERS, name, "--handler-name")
    module, _, function = name.partition(":")
    if not module or not function:
        raise UsageError(f"--handler-name {name}: give module:function, such as forum:forum for a function in forum.py")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # the user's own program
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"--handler-name {name}: {module} cannot be imported: {what}") from None
    if not callable(found):
        raise UsageError(f"--handler-name {name}: {module} has no function {function}")

    def make(args: PreprocessArgs, tokenizer: TokenizerFolder) -> Handler:
        try:
            handler = in_own_handler(name, found)(args, tokenizer)
        except TypeError as error:
            raise UsageError(f"--handler-name {name}: it takes (args, tokenizer): {error}") from None
        for attribute in ("outputs", "columns", "prepare", "documents"):
            if not hasattr(handler, attribute):
                kind = type(handler).__name__
                raise UsageError(f"--handler-name {name} returns a {kind} without {attribute!r}; a Handler is expected")
        return handler

    return make


def in_own_handler(name: str | None, function: Callable[P, R]) -> Callable[P, R]:
    """`function`, but an exception in the file of a user's handler becomes a `UsageError` with its line."""
    module = sys.modules.get(name.partition(":")[0]) if name and ":" in name else None
    if (file := getattr(module, "__file__", None)) is None:
        return function

    def call(*args: P.args, **options: P.kwargs) -> R:
        try:
            return function(*args, **options)
        except UsageError:
            raise
        except Exception as error:  # the user's own program
            lines = [place.lineno for place in traceback.extract_tb(error.__traceback__) if place.filename == file]
            if not lines:
                raise
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(f"--handler-name {name}: {what} ({file}:{lines[-1]})") from error

    return call


def own_source(name: str | None) -> str | None:
    """Digest of the file of a user's handler; None for a built-in one."""
    if name is None or ":" not in name:
        return None
    maker(name)  # imports it
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
