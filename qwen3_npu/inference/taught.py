"""The prompt settings: those of the checkpoint's training, unless flags say otherwise. No torch."""

from __future__ import annotations

import dataclasses

from qwen3_npu import log
from qwen3_npu.args.convert import MEGATRON
from qwen3_npu.args.inference import PromptArgs, WeightArgs
from qwen3_npu.args.preprocess import THINKING
from qwen3_npu.checkpoint.convert.plan import PROMPTS, read_prompt_settings
from qwen3_npu.checkpoint.formats.open import find
from qwen3_npu.data.text.prompt_types import AUTO, TEMPLATES, misfit, resolved
from qwen3_npu.data.text.tokenizer import TokenizerFolder
from qwen3_npu.errors import UsageError
from qwen3_npu.schema import shown

PLAIN = "none"


@dataclasses.dataclass(frozen=True)
class Taught:
    """The prompt settings of a checkpoint's training.

    Attributes:
        prompt_type: of `TEMPLATES`.
        thinking: --enable-thinking.
        tokenizer: `TokenizerFolder.identity` of the tokenizer that made the data; None if it is not known.
    """

    prompt_type: str
    thinking: str
    tokenizer: str | None


def read_taught(weights: WeightArgs) -> Taught | None:
    """The settings of the adapter, else of the model; None if neither has any (published models, text, other programs).

    Raises:
        UsageError: the file beside Hugging Face weights holds a value that is not understood.
    """
    for folder, step in ((weights.lora_load, None), (weights.load, weights.ckpt_step)):
        found = find(folder, step) if folder is not None else None
        said = {} if found is None else read_prompt_settings(found)
        prompt_type, thinking = said.get("prompt_type"), said.get("enable_thinking", "none")
        if prompt_type in TEMPLATES and thinking in THINKING:
            return Taught(prompt_type, thinking, said.get("tokenizer_digest"))
        if said and found is not None and found.kind != MEGATRON:
            raise UsageError(
                f"{found.folder / PROMPTS}: prompt_type {shown(prompt_type)} with enable_thinking {shown(thinking)} is "
                f"not known; delete the file and say how prompts are written with --prompt-type"
            )
        if prompt_type in TEMPLATES:  # the args of MindSpeed-LLM's checkpoints may have other names
            return Taught(prompt_type, "none", said.get("tokenizer_digest"))
    return None


def settle(prompts: PromptArgs, taught: Taught | None, tokenizer: TokenizerFolder) -> tuple[PromptArgs, list[str]]:
    """The flags, completed from the checkpoint, and log lines about it.

    Without a record, prompts are plain text unless --prompt-type names a template; `auto` then follows the tokenizer.
    """
    given = prompts.template_given
    if taught is None:
        if given in (None, PLAIN):
            return dataclasses.replace(prompts, prompt_type=given), []
        name = resolved(given, tokenizer)
        if problem := misfit(name, tokenizer):
            log.warning_once(problem)
        return _with(prompts, name, prompts.enable_thinking), [f"prompts: {name}"]
    if given in (None, AUTO, taught.prompt_type):
        name = taught.prompt_type
    else:
        name = given
        log.warning_once(
            f"--prompt-type {given}: the checkpoint was trained with {taught.prompt_type}; drop the flag to use that"
        )
    thinking = prompts.enable_thinking
    if name == taught.prompt_type:
        if thinking not in (None, taught.thinking):
            log.warning_once(
                f"--enable-thinking {thinking}: the checkpoint was trained with {taught.thinking}; drop the flag "
                "to use that"
            )
        thinking = thinking or taught.thinking
    if taught.tokenizer not in (None, tokenizer.identity):
        log.warning_once(
            f"{tokenizer.path} is not the tokenizer that the checkpoint's training data were made with; give that one "
            "with --tokenizer-name-or-path, unless the two give the same tokens"
        )
    says = f"prompts: {name}, thinking {thinking or 'none'}"
    return _with(prompts, name, thinking), [f"{says} (the checkpoint was trained with {taught.prompt_type})"]


def _with(prompts: PromptArgs, name: str, thinking: str | None) -> PromptArgs:
    return dataclasses.replace(
        prompts, prompt_type=name, hf_chat_template=False, plain_text=False, enable_thinking=thinking
    )
