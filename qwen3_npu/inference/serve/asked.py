"""Translate requests of OpenAI's API to orders: prompts as tokens, limits, sampling."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qwen3_npu import schema
from qwen3_npu.data.text.conversation import ASSISTANT, THINK, TOOL, USER, Conversation, Message, ToolCall
from qwen3_npu.data.text.messages import REASONING, read_messages
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.prompts import waiting
from qwen3_npu.inference.sampling import Sampling
from qwen3_npu.inference.serve.calls import BEGIN_CALL, CallRules
from qwen3_npu.inference.serve.desk import Order
from qwen3_npu.inference.serve.fields import CHAT, COMPLETION, MOST_ANSWERS, Refused, RequestFields, read_fields
from qwen3_npu.inference.text import Writer

_DEFAULT_COMPLETION = 16  # tokens, OpenAI's
_MESSAGE = {"role", "content", "name", "tool_calls", "tool_call_id", *REASONING}


class Asked(NamedTuple):
    """A parsed request.

    Attributes:
        orders: one for each answer, in order.
        prompt_tokens: number of tokens of its prompts, each counted once.
        usage: whether a stream ends with the counts.
        logprobs: whether the answers contain log-probabilities.
        calls: rules to find function calls in the answers; None if the request has no tools.
    """

    kind: str
    orders: list[Order]
    prompt_tokens: int
    stream: bool
    usage: bool
    logprobs: bool
    calls: CallRules | None = None


class ServerLimits(NamedTuple):
    """The limits and defaults of requests.

    Attributes:
        model: name of the model.
        context: maximum number of tokens of a prompt with its answer.
        vocabulary: number of tokens of the vocabulary.
        sampling: defaults for a request.
        chats: whether there is a template for conversations.
    """

    model: str
    context: int
    vocabulary: int
    sampling: Sampling
    chats: bool


class Reader:
    """Reads requests for one model."""

    def __init__(self, writer: Writer, limits: ServerLimits, new_key: Callable[[], int]) -> None:
        """Args: new_key: makes a unique key for each order."""
        self.writer, self.limits, self.new_key = writer, limits, new_key

    def read(self, body: object, kind: str) -> Asked:
        """Parse a request's JSON. Raises: Refused."""
        if not isinstance(body, dict):
            raise Refused(f"the request is {schema.shown(body)}; a JSON object is expected")
        given = read_fields(body, kind)
        if given.get("model", self.limits.model) != self.limits.model:
            raise Refused(
                f"the model {schema.shown(given['model'])} does not exist; this server has {self.limits.model}",
                status=404,
                param="model",
                code="model_not_found",
            )
        calls = None
        if kind == CHAT:
            prompt, calls = self._conversation(given)
            prompts = [prompt]
            top, wanted = given.get("top_logprobs", 0), bool(given.get("logprobs", False))
            if top and not wanted:
                raise Refused("top_logprobs needs logprobs: true", param="top_logprobs")
        else:
            prompts = self._texts(given.get("prompt"))
            top, wanted = given.get("logprobs", 0), "logprobs" in given
        if "stream_options" in given and not given.get("stream"):
            raise Refused("stream_options needs stream: true", param="stream_options")
        return Asked(
            kind,
            self._orders(given, prompts, top, kind=kind),
            sum(map(len, prompts)),
            stream=given.get("stream", False),
            usage=given.get("stream_options", {}).get("include_usage", False),
            logprobs=wanted,
            calls=calls,
        )

    def _orders(self, given: RequestFields, prompts: list[list[int]], top: int, *, kind: str) -> list[Order]:
        count = given.get("n", 1)
        if count * len(prompts) > MOST_ANSWERS:
            raise Refused(f"{count * len(prompts)} answers are asked for; at most {MOST_ANSWERS}", param="n")
        sampling, stops = self._sampling(given), given.get("stop", ())
        for stop in stops:
            _utf8(stop, "stop")
        orders = []
        for place, prompt in enumerate(prompts):
            limit = self._limit(given, prompt, kind)
            for number in range(place * count, (place + 1) * count):
                key = self.new_key()
                orders.append(Order(key, number, prompt, limit, sampling=sampling, stops=stops, top=top))
        return orders

    def _sampling(self, given: RequestFields) -> Sampling:
        default = self.limits.sampling
        temperature = given.get("temperature", default.temperature if default.sample else 0)
        return Sampling(
            sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=max(given.get("top_k", default.top_k), 0),  # -1: all, as vLLM has it
            top_p=given.get("top_p", default.top_p),
            repetition_penalty=given.get("repetition_penalty", default.repetition_penalty),
            presence_penalty=given.get("presence_penalty", 0.0),
            frequency_penalty=given.get("frequency_penalty", 0.0),
            logit_bias=self._biases(given.get("logit_bias", ())),
            seed=given.get("seed", secrets.randbits(63)),
        )

    def _biases(self, biases: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        if biases and biases[-1][0] >= self.limits.vocabulary:
            raise Refused(
                f"logit_bias has token {biases[-1][0]}; the last one is {self.limits.vocabulary - 1}",
                param="logit_bias",
            )
        return biases

    def _limit(self, given: RequestFields, prompt: list[int], kind: str) -> int:
        room = self.limits.context - len(prompt)
        older, newer = given.get("max_tokens"), given.get("max_completion_tokens")
        if older is not None and newer is not None and older != newer:
            raise Refused("max_tokens and max_completion_tokens disagree; give one", param="max_tokens")
        name, wanted = ("max_tokens", older) if newer is None else ("max_completion_tokens", newer)
        if not prompt:
            raise Refused("the prompt is empty", param="messages" if kind == CHAT else "prompt")
        limit = min(room, _DEFAULT_COMPLETION if kind == COMPLETION else room) if wanted is None else wanted
        if limit > room or room < 1:
            asked = "" if wanted is None else f" and {name} is {limit}"
            raise Refused(
                f"the prompt has {len(prompt)} tokens{asked}; this server has room for {self.limits.context} tokens "
                "(--serve-context)",
                param=name if wanted is not None and room > 0 else "messages" if kind == CHAT else "prompt",
                code="context_length_exceeded",
            )
        return limit

    def _conversation(self, given: RequestFields) -> tuple[list[int], CallRules | None]:
        if not self.limits.chats:
            raise Refused("this server has no chat template (--prompt-type none); use /v1/completions", status=404)
        messages, tools = given.get("messages"), given.get("tools")
        if not messages:
            raise Refused("messages are missing", param="messages")
        for name, changes in (
            ("tool_choice", given.get("tool_choice", "none") != "none"),
            ("parallel_tool_calls", "parallel_tool_calls" in given),
        ):
            if changes and not tools:
                raise Refused(f"{name} needs tools", param=name)
        if tools and not self.calls:
            raise Refused("the chat template of this model does not write <tool_call>, leave tools out", param="tools")
        has_calls = bool(tools) and given.get("tool_choice") != "none"
        try:
            text = self.writer.prompt(_read(messages, tools if has_calls else None), **_thinking(given))
        except (ValueError, UsageError) as error:
            raise Refused(str(error), param="messages") from None
        rules = CallRules(not given.get("parallel_tool_calls", True), text.rstrip().endswith(THINK))
        return self._tokens(text, "messages"), rules if has_calls else None

    @functools.cached_property
    def calls(self) -> bool:
        """Whether the template writes calls in the form that `CallReader` reads."""
        asked = Message(USER, "a"), Message(ASSISTANT, "", calls=(ToolCall("f", {}),)), Message(TOOL, "b")
        try:
            return f"{BEGIN_CALL}\n" in self.writer.prompt(Conversation(asked))
        except (ValueError, UsageError):
            return False

    def _texts(self, prompt: object) -> list[list[int]]:
        """The prompts in OpenAI's form: a text, tokens, or a list of either."""
        listed = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
        return [self._text(one) for one in listed]

    def _text(self, prompt: object) -> list[int]:
        if isinstance(prompt, str):
            return self._tokens(prompt, "prompt")
        if not isinstance(prompt, list):
            raise Refused(
                f"prompt is {schema.shown(prompt)}; a text, a list of tokens, or a list of either is expected",
                param="prompt",
            )
        try:
            return [schema.integer(token, "prompt", least=0, most=self.limits.vocabulary - 1) for token in prompt]
        except UsageError as error:
            raise Refused(str(error), param="prompt") from None

    def _tokens(self, text: str, param: str) -> list[int]:
        _utf8(text, param)
        return self.writer.tokens(text)


def _read(messages: Sequence[object], tools: Sequence[object] | None) -> Conversation:
    """Raises: ValueError: it is no message, or a field is not understood."""
    for place, message in enumerate(messages, start=1):
        for name, value in message.items() if isinstance(message, dict) else ():
            if name not in _MESSAGE and value is not None:
                raise ValueError(f"message {place} has {schema.shown(name)}, which is not understood")
    return waiting(read_messages(list(messages), tools))


def _thinking(given: RequestFields) -> dict[str, bool]:
    said = given.get("chat_template_kwargs", {}).get("enable_thinking")
    return {} if said is None else {"thinking": said}


def _utf8(text: str, param: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(f"{param} has half a surrogate pair, which is no text", param=param) from None
