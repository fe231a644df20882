"""`--prompt-type`: conversations to text and tokens, for preprocessing, generation, chat and evaluation alike.

`read_messages` (messages.py) makes a conversation of OpenAI's messages, tools included. `Template.render` writes it for
training, `prompt_tokens` writes it up to the start of the next answer. Both write the same strings; each string is
encoded separately.
"""

from __future__ import annotations

from collections.abc import Callable

from qwen3_npu import log
from qwen3_npu.data.text.chat_template import chat_templates, hf_template
from qwen3_npu.data.text.conversation import THINK, Conversation
from qwen3_npu.data.text.encoder import Encoder
from qwen3_npu.data.text.templates import QWEN, QWEN3_TEMPLATE, Template
from qwen3_npu.data.text.tokenizer import TokenizerFolder

AUTO = "auto"
TEMPLATES: dict[str, Callable[[TokenizerFolder], Template]] = {
    "qwen": lambda tokenizer: QWEN,
    "qwen3": lambda tokenizer: QWEN3_TEMPLATE,
    "hf": hf_template,
}


def resolved(prompt_type: str, tokenizer: TokenizerFolder) -> str:
    """The prompt type that `auto` means: `hf` with a tokenizer that has a chat template, else `qwen3`."""
    if prompt_type != AUTO:
        return prompt_type
    return "hf" if chat_templates(tokenizer) else "qwen3"


def open_template(prompt_type: str, tokenizer: TokenizerFolder) -> Template:
    """The template of a `--prompt-type` for a tokenizer; `auto` is resolved.

    Raises:
        UsageError: the tokenizer has no chat template, a broken one, or lacks a token that the template writes.
    """
    name = resolved(prompt_type, tokenizer)
    template = TEMPLATES[name](tokenizer)
    for token in template.tokens:
        tokenizer.id(token, f"--prompt-type {name}")
    return template


def misfit(prompt_type: str, tokenizer: TokenizerFolder) -> str | None:
    """The reason why a prompt type does not fit a tokenizer's model, or None.

    `qwen3` writes empty thoughts (`<think>\\n\\n</think>`) before answers. A model whose chat template knows no
    thoughts (Qwen3-Instruct-2507) has never seen them; a model whose template opens thoughts expects another prompt.
    """
    if resolved(prompt_type, tokenizer) != "qwen3":
        return None
    sources = chat_templates(tokenizer)
    if not sources:
        return None
    if not any(THINK in source for source in sources.values()):
        what = f"writes {THINK} marks, which the chat template of {tokenizer.path} does not know"
    elif hf_template(tokenizer).opens_thought:
        what = f"closes thoughts before answers, where the chat template of {tokenizer.path} opens them"
    else:
        return None
    return f"--prompt-type qwen3 {what}; --prompt-type auto follows the tokenizer"


def warn_of_misfit(prompt_type: str, tokenizer: TokenizerFolder) -> None:
    """Warn once if a prompt type does not fit a tokenizer."""
    if problem := misfit(prompt_type, tokenizer):
        log.warning_once(problem)


def prompt_tokens(template: Template, conversation: Conversation, thinking: bool | None, encoder: Encoder) -> list[int]:
    """The tokens of a conversation up to the start of the next answer, as in training.

    Args:
        conversation: it ends with a question; `read_messages` makes it of OpenAI's messages.
        thinking: --enable-thinking.

    Raises:
        ValueError: the template refuses the conversation.
    """
    return encoder.encode(template.prompt(conversation, thinking)).ids.tolist()


def prompt_text(template: Template, conversation: Conversation, thinking: bool | None) -> str:
    """The text of `prompt_tokens`, for display. Raises: ValueError: the template refuses the conversation."""
    return "".join(template.prompt(conversation, thinking))
