"""The table of `--handler-name`."""

from __future__ import annotations

from collections.abc import Callable

from qwen3_npu.args.preprocess import PreprocessArgs
from qwen3_npu.data.encoder import Encoder
from qwen3_npu.data.pretrain_text import PretrainHandler, TextOf, alpaca_text, sharegpt_text, text_value
from qwen3_npu.data.produced import Handler
from qwen3_npu.data.tokenizer import TokenizerFolder

Make = Callable[[PreprocessArgs, TokenizerFolder, Encoder], Handler]


def _pretrain(text_of: TextOf, columns: tuple[str, ...] = ()) -> Make:
    def make(args: PreprocessArgs, tokenizer: TokenizerFolder, encoder: Encoder) -> Handler:
        eod = tokenizer.eos() if args.tokenizer.append_eod else None
        return PretrainHandler(text_of, args.input.json_keys, columns or args.input.json_keys, encoder, eod)

    return make


HANDLERS: dict[str, Make] = {
    "GeneralPretrainHandler": _pretrain(text_value),
    "AlpacaPretrainHandler": _pretrain(alpaca_text, ("instruction", "input", "output")),
    "SharegptPretrainHandler": _pretrain(sharegpt_text),
}
