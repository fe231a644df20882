"""inference.py --serve, asked by OpenAI's own client: answers are transformers', whatever else is asked meanwhile."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import generation
import quiz
import serving
import tiny
from qwen3_npu import cli
from qwen3_npu.args.inference import FOREIGN, GROUPS, InferenceArgs
from qwen3_npu.errors import UsageError
from qwen3_npu.platform import select_platform

openai = pytest.importorskip("openai", reason="the client of the server (pip install openai)")

PROMPTS = ["Once", "The lighthouse keeper", "a", "Once upon a time there was", "북 é 😀", "The sea", "x y z", "The"]
LIMIT = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_model(tmp_path_factory.mktemp("model") / "tiny-qwen3", tiny.arch("tied", vocab_size=800))
    return quiz.write_tokenizer(folder)


@pytest.fixture(scope="module")
def server(model: Path, process: Any) -> Iterator[Any]:
    flags = ["--serve-context", "400", "--predict-batch-size", "8", "--temperature", "0"]
    with serving.serving(select_platform("cpu"), process, model, *flags) as found:
        yield found


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def theirs(model: Path) -> Any:
    """transformers' model and tokenizer."""
    from transformers import AutoTokenizer

    return generation.transformers_model(model), AutoTokenizer.from_pretrained(model)


def told(theirs: Any, prompt: str, limit: int, **options: Any) -> str:
    """transformers' answer as text."""
    loaded, tokenizer = theirs
    (answer,) = generation.transformers_answers(loaded, [tokenizer(prompt).input_ids], limit, eos_token_id=[0, 1, 2])
    return tokenizer.decode(answer, skip_special_tokens=False)


def sample(server: Any, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.split("{")[0].split()[0] == name)


def test_100_concurrent_requests_get_the_answers_of_each_alone(server: Any, theirs: Any) -> None:
    """Greedy ones those of transformers; sampled ones, between them, those of their seed."""
    expected = [told(theirs, prompt, LIMIT) for prompt in PROMPTS]

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> Any:
                drawn: dict[str, Any] = {"temperature": 1.5, "seed": number % 8} if number % 4 == 3 else {}
                prompt = PROMPTS[number % len(PROMPTS)]
                return await client.completions.create(model="tiny-qwen3", prompt=prompt, max_tokens=LIMIT, **drawn)

            return await asyncio.gather(*map(one, range(100)))

    before = sample(server, "qwen3_npu_generated_tokens_total")
    answers = asyncio.run(ask())
    for number, answer in enumerate(answers):
        (choice,) = answer.choices
        if number % 4 == 3:
            assert choice.text == answers[number % 8 + 8].choices[0].text
        else:
            assert choice.text == expected[number % len(PROMPTS)]
        assert choice.finish_reason == "length"
        assert answer.usage.completion_tokens == LIMIT
        assert answer.usage.prompt_tokens == len(theirs[1](PROMPTS[number % len(PROMPTS)]).input_ids)
    assert len({answers[3].choices[0].text, answers[7].choices[0].text, expected[3], expected[7]}) == 4
    assert sample(server, "qwen3_npu_generated_tokens_total") - before == 100 * LIMIT
    assert sample(server, "qwen3_npu_running") == 0


def test_a_chat_is_written_by_the_template_of_the_tokenizer(client: Any, theirs: Any) -> None:
    messages = [
        {"role": "system", "content": "Say little."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "and?"},
    ]
    for thinking in (True, False):
        plain = [
            {**m, "content": m["content"][0]["text"] if m["role"] == "user" and i == 1 else m["content"]}
            for i, m in enumerate(messages)
        ]
        text = theirs[1].apply_chat_template(
            plain, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        answer = client.chat.completions.create(
            model="tiny-qwen3",
            messages=messages,
            max_completion_tokens=LIMIT,
            extra_body={"chat_template_kwargs": {"enable_thinking": thinking}},
        )
        assert answer.choices[0].message.content == told(theirs, text, LIMIT)
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage.prompt_tokens == len(theirs[1](text).input_ids)
        streamed = list(
            client.chat.completions.create(
                model="tiny-qwen3",
                messages=messages,
                max_tokens=LIMIT,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"chat_template_kwargs": {"enable_thinking": thinking}},
            )
        )
        assert "".join(c.choices[0].delta.content or "" for c in streamed[:-1]) == answer.choices[0].message.content
        assert streamed[0].choices[0].delta.role == "assistant"
        assert streamed[-2].choices[0].finish_reason == "length"
        assert streamed[-1].usage == answer.usage


def test_a_request_decides_about_thoughts(model: Path) -> None:
    """Qwen3's template closes a thought that is not wanted."""
    from qwen3_npu.args.inference import PromptArgs
    from qwen3_npu.data.text.tokenizer import open_tokenizer
    from qwen3_npu.inference.sampling import Sampling
    from qwen3_npu.inference.serve.asked import Reader, ServerLimits
    from qwen3_npu.inference.text import Writer

    writer = Writer(open_tokenizer(str(model)), PromptArgs(prompt_type="qwen3", enable_thinking="true"))
    reader = Reader(writer, ServerLimits("m", 400, 800, sampling=Sampling(), chats=True), lambda: 0)
    for asked, closed in ((None, False), (True, False), (False, True)):
        kwargs = {} if asked is None else {"chat_template_kwargs": {"enable_thinking": asked}}
        (order,) = reader.read({**CHAT, **kwargs}, "chat").orders
        assert writer.encoder.decode(order.tokens).endswith("<think>\n\n</think>\n\n") == closed


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def test_penalties_and_biases_choose_the_tokens_that_openai_says(client: Any, theirs: Any) -> None:
    loaded, tokenizer = theirs
    ids = tokenizer("The sea").input_ids
    tokens, bias = list(ids), {"5": 40, "9": 39.5}
    for _ in range(LIMIT):
        scores = loaded(torch.tensor([tokens])).logits[0, -1]
        for token in set(tokens[len(ids) :]):
            scores[token] -= 0.75 + 0.5 * tokens[len(ids) :].count(token)
        for token, more in bias.items():
            scores[int(token)] += more
        tokens.append(int(scores.argmax()))
    assert len(set(tokens[len(ids) :])) > 1
    options: dict[str, Any] = {"presence_penalty": 0.75, "frequency_penalty": 0.5, "logit_bias": bias}
    answer = client.completions.create(model="tiny-qwen3", prompt=[ids], max_tokens=LIMIT, **options)
    assert answer.choices[0].text == tokenizer.decode(tokens[len(ids) :])


def test_logprobs_are_the_log_softmax_of_transformers(client: Any, theirs: Any) -> None:
    loaded, tokenizer = theirs
    ids = tokenizer("The sea").input_ids
    options: dict[str, Any] = {"model": "tiny-qwen3", "max_tokens": 3, "n": 2, "temperature": 1.2, "seed": 4}
    answer = client.completions.create(prompt=[ids], logprobs=2, **options)
    assert answer.choices[0].text != answer.choices[1].text
    for choice in answer.choices:
        tokens = list(ids)
        for token, logprob, top in zip(
            *(getattr(choice.logprobs, name) for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True
        ):
            scores = loaded(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            chosen = int((scores - logprob).abs().argmin())
            assert scores[chosen].item() == pytest.approx(logprob, abs=1e-5)
            assert tokenizer.decode([chosen]) == token
            assert sorted(top.values()) == pytest.approx(sorted(scores.topk(2).values.tolist()), abs=1e-5)
            tokens.append(chosen)
        assert choice.logprobs.text_offset[0] == 0
    streamed = client.completions.create(prompt=[ids], logprobs=0, stream=True, **options)
    scored: list[list[float]] = [[], []]
    for chunk in streamed:
        for choice in chunk.choices:
            scored[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert scored == [choice.logprobs.token_logprobs for choice in answer.choices]
    options = {"model": "tiny-qwen3", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
    chat = client.chat.completions.create(logprobs=True, top_logprobs=3, **options)
    for token in chat.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(client: Any, theirs: Any) -> None:
    plain = told(theirs, "Once upon a time", 12)
    stop = plain[3:6]
    for given in (stop, ["never said", stop]):
        options: dict[str, Any] = {"model": "tiny-qwen3", "prompt": "Once upon a time", "max_tokens": 12, "stop": given}
        (choice,) = client.completions.create(**options).choices
        assert (choice.text, choice.finish_reason) == (plain[: plain.index(stop)], "stop")
        pieces = [chunk.choices[0].text for chunk in client.completions.create(stream=True, **options)]
        assert "".join(pieces) == choice.text, "no part of a stop text is ever sent"


def test_a_client_that_leaves_frees_its_slot(server: Any) -> None:
    before = sample(server, "qwen3_npu_dropped_answers_total")
    for stream in (True, False):
        body = json.dumps({"prompt": "Once", "max_tokens": 390, "n": 8, "stream": stream, "temperature": 0}).encode()
        with socket.create_connection(server.server_address[:2]) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if stream:
                assert connection.recv(12) == b"HTTP/1.1 200"
            else:
                time.sleep(0.05)
        until = time.monotonic() + 5
        while sample(server, "qwen3_npu_running") + sample(server, "qwen3_npu_waiting") and time.monotonic() < until:
            time.sleep(0.02)
    assert sample(server, "qwen3_npu_running") == 0
    assert sample(server, "qwen3_npu_dropped_answers_total") - before == 16


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
REFUSED: list[tuple[str, Any, int, str]] = [
    ("chat/completions", {**CHAT, "temprature": 1}, 400, "'temprature' is not understood; did you mean temperature?"),
    ("chat/completions", {**CHAT, "temperature": 3}, 400, "temperature is 3.0; at most 2 is expected"),
    ("chat/completions", {**CHAT, "temperature": 1e-30}, 400, "temperature is 1e-30; 0 (the likeliest token) or"),
    ("chat/completions", {**CHAT, "max_tokens": True}, 400, "max_tokens is true; an integer is expected"),
    ("chat/completions", {**CHAT, "max_tokens": 400}, 400, "this server has room for 400 tokens"),
    ("chat/completions", {**CHAT, "max_tokens": 4, "max_completion_tokens": 5}, 400, "disagree"),
    ("chat/completions", {**CHAT, "presence_penalty": 2.5}, 400, "presence_penalty is 2.5; at most 2 is expected"),
    ("chat/completions", {**CHAT, "logit_bias": {"800": 1}}, 400, "logit_bias has token 800; the last one is 799"),
    (
        "chat/completions",
        {**CHAT, "logit_bias": {"a": 1}},
        400,
        "logit_bias has 'a'; the number of a token is expected",
    ),
    ("chat/completions", {**CHAT, "logit_bias": {"5": 101}}, 400, "logit_bias[5] is 101.0; at most 100 is expected"),
    ("chat/completions", {**CHAT, "logit_bias": {"5": 1, "05": 1}}, 400, "logit_bias has a token twice"),
    ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools[0] has no function"),
    ("chat/completions", {**CHAT, "tools": TOOLS, "tool_choice": "required"}, 400, "calls are not forced here"),
    ("chat/completions", {**CHAT, "tool_choice": "auto"}, 400, "tool_choice needs tools"),
    ("chat/completions", {**CHAT, "tools": TOOLS}, 400, "the chat template of this model does not write <tool_call>"),
    (
        "chat/completions",
        {**CHAT, "response_format": {"type": "json_object"}},
        400,
        "response_format is {'type': 'json_object'}; it is not",
    ),
    ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
    ("chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, 400, "needs stream: true"),
    ("chat/completions", {**CHAT, "chat_template_kwargs": {"a": True}}, 400, "'a' is not understood"),
    ("chat/completions", {**CHAT, "model": "gpt"}, 404, "the model 'gpt' does not exist; this server has tiny-qwen3"),
    ("chat/completions", {}, 400, "messages are missing"),
    ("chat/completions", {"messages": [{"role": "bot", "content": "x"}]}, 400, "message 1 has role 'bot'"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x", "tone": 1}]}, 400, "message 1 has 'tone'"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, 400, "nothing to answer"),
    ("completions", {}, 400, "prompt is null"),
    ("completions", {"prompt": ""}, 400, "the prompt is empty"),
    ("completions", {"prompt": [800]}, 400, "prompt is 800; at most 799 is expected"),
    ("completions", {"prompt": "x" * 2000}, 400, "room for 400 tokens"),
    ("completions", {"prompt": "\ud800"}, 400, "half a surrogate pair"),
    ("completions", {"prompt": ["x"] * 65, "n": 2}, 400, "130 answers are asked for; at most 128"),
    ("completions", {"prompt": "x", "stop": ["x" * 1001]}, 400, "stop has a text of 1001 characters"),
    ("completions", [], 400, "a JSON object is expected"),
    ("completions", b'{"prompt": "x", "n": 1, "n": 2}', 400, "it has 'n' twice"),
    ("completions", b'{"prompt": NaN}', 400, "it has NaN"),
    ("completions", b"[" * 100_000, 400, "nested too deeply"),
    ("completions", b"\xff", 400, "cannot be read as JSON"),
    ("embeddings", {"input": "x"}, 404, "POST '/v1/embeddings' is not offered"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(
    server: Any, path: str, body: Any, status: int, message: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        serving.post(f"{server.url}/v1/{path}", body)
    error = json.loads(caught.value.read())["error"]
    assert caught.value.code == status
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_the_client_raises_its_own_errors(client: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens is 0; at least 1 is expected") as caught:
        client.completions.create(model="tiny-qwen3", prompt="x", max_tokens=0)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert [model.id for model in client.models.list()] == ["tiny-qwen3"]
    monkeypatch.setattr(server, "key", "secret")
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert client.with_options(api_key="secret").models.list().data[0].id == "tiny-qwen3"
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        assert json.loads(answer.read()) == {"status": "ok"}


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Content-Type": "application/json", "Content-Length": str(9 << 20)}, b"x" * (9 << 20), 413),
        ({"Content-Type": "application/json", "Content-Length": "9" * 5000}, b"", 411),
        ({"Content-Type": "application/json", "Transfer-Encoding": "chunked"}, b"0\r\n\r\n", 411),
        ({"Content-Type": "text/plain", "Content-Length": "2"}, b"{}", 415),
        ({"Content-Type": "application/json", "Content-Length": "2", "Host": "evil.example"}, b"{}", 403),
    ],
)
def test_what_a_body_must_be(server: Any, headers: dict[str, str], body: bytes, status: int) -> None:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    connection.putrequest("POST", "/v1/completions", skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(body)
    if status == 411:
        connection.sock.shutdown(socket.SHUT_WR)
    answer = connection.getresponse()
    assert answer.status == status
    assert "message" in json.loads(answer.read())["error"]
    connection.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--serve", "--serve-host", "0.0.0.0"], "--serve-host 0.0.0.0 lets other machines in; give a token"),
        (["--serve", "--serve-api-key", "a b"], "must be printable ASCII without spaces"),
        (["--serve", "--prompt", "x"], "--prompt: --serve does no --task"),
        (["--serve", "--task", "chat"], "--task: --serve does no --task"),
        (["--serve-port", "80"], "--serve-port says how to serve; give --serve, too"),
    ],
)
def test_flags_that_do_not_fit(model: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        InferenceArgs(*cli.parse("t", "", GROUPS, FOREIGN, argv=["--load", str(model), *flags]).groups).check()


def test_the_first_ctrl_c_lets_answers_end_and_the_second_does_not(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one: it ends the server."""
    from qwen3_npu.inference.serve import desk, run

    monkeypatch.setattr(desk, "_SAME_SIGNAL", 0.0)
    url = f"{server.url}/v1/completions"

    def stream(**asked: int) -> Any:
        body = json.dumps({"prompt": "Once", "temperature": 0, "stream": True, **asked}).encode()
        return urllib.request.urlopen(
            urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=30
        )

    with stream(max_tokens=390, n=7) as long, stream(max_tokens=20) as short, run._until_stopped(server.desk):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            serving.post(url, {"prompt": "x"})
        events = [json.loads(event[6:]) for event in short if event.startswith(b"data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        signal.raise_signal(signal.SIGINT)
        events = [json.loads(event[6:]) for event in long if event.startswith(b"data: {")]
        assert events[-1]["error"]["message"] == "the server stopped before the answer was complete"
