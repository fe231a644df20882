"""Bodies and chunks of OpenAI's API from pieces of answers.

Their form: https://platform.openai.com/docs/api-reference/chat/object, .../chat/streaming and .../completions/object.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable

from qwen3_npu.data.text.encoder import Encoder
from qwen3_npu.inference.serve.asked import Asked
from qwen3_npu.inference.serve.calls import CallReader, tool_call
from qwen3_npu.inference.serve.desk import Piece
from qwen3_npu.inference.serve.fields import CHAT, Refused

_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
Json = dict[str, object]


def error_body(refused: Refused) -> Json:
    """OpenAI's error object."""
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}


class Answers:
    """The growing answers to one request."""

    def __init__(self, asked: Asked, model: str, encoder: Encoder) -> None:
        self.asked, self.encoder = asked, encoder
        self.chat = asked.kind == CHAT
        count = len(asked.orders)
        self.texts, self.finish = [""] * count, [""] * count
        self.readers = [CallReader(asked.calls) for _ in range(count)] if asked.calls else []
        self.calls: list[list[Json]] = [[] for _ in range(count)]
        self.news: list[list[Json]] = [[] for _ in range(count)]  # deltas of the last piece
        self.tokens = [0] * count
        self.scored: list[list[Piece]] = [[] for _ in range(count)]  # not sent yet
        self.begun = [False] * count
        self.lengths = [0] * count  # characters before the next token, for text_offset
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self.head = {"id": self.id, "created": int(time.time()), "model": model}

    @property
    def done(self) -> bool:
        """Whether all answers have ended."""
        return all(self.finish)

    def add(self, number: int, piece: Piece) -> None:
        """Add a piece to answer `number`."""
        self.tokens[number] += len(piece.tokens)
        if self.asked.logprobs and piece.tokens:
            self.scored[number].append(piece)
        self.news[number] = []
        ends = bool(piece.finish)
        for part in self.readers[number].read(piece.text, end=ends) if self.readers else [piece.text]:
            if isinstance(part, str):
                self.texts[number] += part
                self.news[number] += [{"content": part}] if part else []
                continue
            call = tool_call(part)
            self.news[number].append({"tool_calls": [{"index": len(self.calls[number]), **call}]})
            self.calls[number].append(call)
        self.finish[number] = _FINISH.get(piece.finish, piece.finish)
        if self.calls[number] and self.finish[number] == "stop":
            self.finish[number] = "tool_calls"

    def usage(self) -> Json:
        """Counts of tokens."""
        said, made = self.asked.prompt_tokens, sum(self.tokens)
        return {"prompt_tokens": said, "completion_tokens": made, "total_tokens": said + made}

    def body(self) -> Json:
        """The body with all complete answers."""
        choices = []
        for number, text in enumerate(self.texts):
            calls = self.calls[number]
            message = {"role": "assistant", "content": text or None, "tool_calls": calls} if calls else None
            message = message or {"role": "assistant", "content": text}
            choices.append(self._choice(number, {"message": message} if self.chat else {"text": text}))
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage()}

    def chunks(self, number: int, piece: Piece) -> Iterable[Json]:
        """The chunks of a stream for a piece of answer `number`; call `add` before."""
        if self.chat and not self.begun[number]:
            self.begun[number] = True
            yield self._chunk([self._delta(number, {"role": "assistant", "content": ""}, None, None)])
        news = self.news[number]
        if not news and piece.finish and self.scored[number]:
            news = [{"content": ""}]
        for delta in news:
            content = delta if self.chat else delta["content"]
            yield self._chunk([self._delta(number, content, self._logprobs(number), None)])
        if piece.finish:
            yield self._chunk([self._delta(number, {} if self.chat else "", None, self.finish[number])])

    def last_chunk(self) -> Json:
        """The chunk with the counts, if the request asks for it."""
        return {**self._chunk([]), "usage": self.usage()}

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices}
        return {**chunk, "usage": None} if self.asked.usage else chunk

    def _delta(self, number: int, content: object, logprobs: Json | None, finish: str | None) -> Json:
        what = {"delta" if self.chat else "text": content}
        return {"index": number, **what, "logprobs": logprobs, "finish_reason": finish}

    def _choice(self, number: int, what: Json) -> Json:
        return {"index": number, **what, "logprobs": self._logprobs(number), "finish_reason": self.finish[number]}

    def _logprobs(self, number: int) -> Json | None:
        """Log-probabilities of the tokens that were not sent yet."""
        if not self.asked.logprobs:
            return None
        pieces, self.scored[number] = self.scored[number], []
        found = [
            (token, logprob, likeliest)
            for piece in pieces
            for token, logprob, likeliest in zip(piece.tokens, piece.logprobs, piece.likeliest or [[]], strict=True)
        ]
        if self.chat:
            return {"content": [self._token(t, p, [self._token(*one) for one in likely]) for t, p, likely in found]}
        tokens = [self._text(token) for token, _, _ in found]
        offsets = []
        for text in tokens:
            offsets.append(self.lengths[number])
            self.lengths[number] += len(text)
        likeliest = [{self._text(t): p for t, p in likely} for _, _, likely in found]
        return {
            "tokens": tokens,
            "token_logprobs": [logprob for _, logprob, _ in found],
            "top_logprobs": likeliest if self.asked.orders[number].top else None,
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float, likeliest: list[Json] | None = None) -> Json:
        text = self._text(token)
        told: Json = {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}
        return told if likeliest is None else {**told, "top_logprobs": likeliest}

    def _text(self, token: int) -> str:
        return self.encoder.decode([token])
