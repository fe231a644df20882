"""inference.py around the engine: prompts, text that grows, stop texts, the chat's screen, refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import generation
import quiz
import tiny
from qwen3_npu import cli
from qwen3_npu.args.inference import FOREIGN, GROUPS, InferenceArgs, PromptArgs
from qwen3_npu.data.text.conversation import ASSISTANT, USER, Message
from qwen3_npu.data.text.tokenizer import open_tokenizer
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.plan import plan_inference
from qwen3_npu.inference.prompts import read_prompts
from qwen3_npu.inference.text import TextStream, Writer
from qwen3_npu.platform import select_platform


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_model(tmp_path_factory.mktemp("model") / "hf", tiny.arch(vocab_size=800))
    return quiz.write_tokenizer(folder)


def parse(model: Path, *flags: object) -> InferenceArgs:
    words = ["--load", str(model), "--device", "cpu", *map(str, flags)]
    return InferenceArgs(*cli.parse("test", "", GROUPS, FOREIGN, argv=words).groups)


def run(process: Any, model: Path, out: Path, *flags: object) -> list[dict[str, Any]]:
    from qwen3_npu.inference.run import generate

    args = parse(model, "--output-dir", out, *flags)
    plan = plan_inference(args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=1)
    generate(select_platform("cpu"), process, args, plan)
    return [json.loads(line) for line in (out / "text_generation_result.jsonl").read_text().splitlines()]


def test_tasks_write_their_answers(process: Any, model: Path, tmp_path: Path) -> None:
    flags = ("--task", "greedy", "do_sample", "beam_search", "beam_search_with_sampling", "--num-beams", 2)
    found = run(process, model, tmp_path, *flags, "--prompt", "Once", "The lighthouse keeper", "--max-new-tokens", 6)
    assert [(r["task"], r["prompt"]) for r in found] == [
        (task, prompt) for task in flags[1:5] for prompt in ("Once", "The lighthouse keeper")
    ]
    writer = Writer(open_tokenizer(str(model)), PromptArgs())
    theirs = generation.transformers_model(model)
    for record in found[:2]:
        expected = generation.transformers_answers(theirs, [writer.tokens(record["prompt"])], 6, eos_token_id=[0, 1])
        assert record["tokens"] == expected[0]
        assert len(record["logprobs"]) == len(record["tokens"])
    assert all(record["score"] < 0 for record in found[4:])
    text = (tmp_path / "text_generation_result.txt").read_text()
    assert all(record["answer"] in text for record in found)


def test_stop_texts_and_no_cache(process: Any, model: Path, tmp_path: Path) -> None:
    flags = ("--prompt", "Once upon a time", "--max-new-tokens", 12)
    (plain,) = run(process, model, tmp_path, *flags)
    stop = plain["answer"][3:6]
    (stopped,) = run(process, model, tmp_path, *flags, "--stop", stop, "never said")
    assert stopped["answer"] == plain["answer"][: plain["answer"].index(stop)]
    assert (stopped["finish"], plain["finish"]) == ("stop", "length")
    assert len(stopped["tokens"]) < len(plain["tokens"])
    (slow,) = run(process, model, tmp_path, *flags, "--no-use-kv-cache")
    assert slow["tokens"] == plain["tokens"]


def test_a_stream_shows_everything_once(model: Path) -> None:
    encoder = Writer(open_tokenizer(str(model)), PromptArgs()).encoder
    text = "The caf\u00e9 \u5317\u4eac \U0001f600 end"
    tokens = encoder.encode([text]).ids.tolist()
    assert len(tokens) > len(text.split())
    stream = TextStream(encoder, (0,))
    shown = [stream.add(token) for token in tokens]
    assert "\ufffd" not in "".join(shown), "bytes of a character are not shown before it is whole"
    assert "".join(shown) + stream.rest() == text
    stream = TextStream(encoder, (0,), ("\u4eac \U0001f600", "zzz"))
    shown = [stream.add(token) for token in tokens if not stream.stopped]
    assert stream.stopped
    assert "".join(shown) == "The caf\u00e9 \u5317", "no part of a stop text is ever shown"


def test_the_screen_hides_thoughts() -> None:
    from qwen3_npu.inference.chat.screen import Screen

    for hidden, expected in ((True, "qwen3_npu: ab < c\n"), (False, "qwen3_npu: a<think>x</think>\n\nb < c\n")):
        out = io.StringIO()
        screen = Screen(out, hidden=hidden)
        for letter in "a<think>x</think>\n\nb < c":
            screen.write(letter)
        screen.end()
        assert out.getvalue() == expected


def test_prompts_of_files(model: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\ntwo\n")
    records = tmp_path / "prompts.jsonl"
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    conversation.append({"role": "user", "content": "c"})
    rows = [{"prompt": "p"}, "text", {"instruction": "do", "input": "it"}, {"messages": conversation}]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(*flags: object) -> list[list[str]]:
        return [[m.content for m in prompt.messages] for prompt in read_prompts(parse(model, *flags).generate)]

    assert read("--prompt", "zero", "--predict-data", lines) == [["zero"], ["one"], ["two"]]
    assert read("--predict-data", records) == [["p"], ["text"], ["do\nit"], ["a", "b", "c"]]
    assert read("--predict-data", "a text that is no file") == [["a text that is no file"]]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prompt-type", "qwen3"], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (
            ["--prompt-type", "qwen3", "--enable-thinking", "true"],
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (["--hf-chat-template"], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (
            ["--hf-chat-template", "--system", "S"],
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        ),
        ([], "hi"),
    ],
)
def test_templates(flags: list[str], expected: str, model: Path) -> None:
    args = parse(model, "--prompt", "x", *flags)
    assert Writer(open_tokenizer(str(model)), args.prompts).text([Message(USER, "hi")]) == expected


def test_earlier_answers_of_a_conversation(model: Path) -> None:
    writer = Writer(open_tokenizer(str(model)), parse(model, "--prompt", "x", "--prompt-type", "qwen3").prompts)
    text = writer.text([Message(USER, "a"), Message(ASSISTANT, "<think>\nt\n</think>\n\nb"), Message(USER, "c")])
    assert text.startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x", "--task", "search"], "invalid choice: 'search'"),
        (["--prompt", "x", "--hf-chat-template", "--prompt-type", "qwen3"], "name two templates"),
        (["--prompt", "x", "--task", "do_sample", "--temperature", "0"], "needs --temperature above 0"),
        (["--prompt", "x", "--top-p", "0"], "--top-p: 0 is too small"),
        (["--prompt", "x", "--system", "be brief"], "needs a template"),
        (["--predict-data", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--predict-data", "{bad}"], "line 2: not JSON"),
        (["--prompt", "x", "--context-parallel-size", "2"], "is for training"),
        (["--prompt", "x", "--tensor-model-parallel-size", "2"], "1 processes cannot hold copies of TP 2"),
        (["--prompt", "x", "--tokenizer-name-or-path", "nowhere"], "nowhere holds no tokenizer.json"),
        (["--prompt", "x", "--load", "nowhere"], "--load nowhere does not exist"),
        (["--prompt", "x", "--task", "beam_search", "--no-use-kv-cache"], "needs the cache"),
        (["--task", "chat", "--no-chat-template"], "--task chat needs a template"),
        (["--prompt", "x", "--hf-chat-template", "--no-chat-template"], "contradict each other"),
        (["--prompt", "x", "--lora-load", "{model}"], "holds a model and no LoRA tensors"),
        (["--prompt", "x", "--load", "{adapter}"], "{adapter} is a PEFT adapter; give its model with --load"),
        (["--prompt", "x", "--lora-load", "nowhere"], "--lora-load nowhere does not exist"),
    ],
)
def test_refusals(
    flags: list[str], message: str, process: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"prompt\n')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises((UsageError, SystemExit)) as refused:
        run(process, model, tmp_path, *(flag.format(bad=bad, model=model, adapter=adapter) for flag in flags))
    assert message.replace("{adapter}", str(adapter)) in str(refused.value) + capsys.readouterr().err
    assert not list(tmp_path.glob("text_generation_result*")), "nothing is half-written"


def test_sampling_follows_generation_config_unless_flags_say_otherwise(
    process: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import shutil

    import torch
    from transformers import GenerationConfig

    folder = Path(shutil.copytree(model, tmp_path / "hf"))
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 5.0, "min_p": 0.1}
    (folder / "generation_config.json").write_text(json.dumps({**said, "eos_token_id": [1, 7], "top_p": None}))
    theirs = GenerationConfig.from_pretrained(folder)
    lines: list[str] = []
    monkeypatch.setattr("qwen3_npu.log.info", lines.append)
    flags = ("--prompt", "Once upon a time", "--max-new-tokens", 12)
    (record,) = run(process, folder, tmp_path, *flags)
    hf = generation.transformers_model(folder)
    prompt = Writer(open_tokenizer(str(model)), PromptArgs()).tokens("Once upon a time")
    answer = hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0, min_p=None)
    assert record["tokens"] == answer[0].tolist()[len(prompt) :], (
        "greedy takes the file's repetition penalty, as theirs"
    )
    (plain,) = run(process, folder, tmp_path, *flags, "--repetition-penalty", 1)
    assert plain["tokens"] != record["tokens"]
    assert any(line.startswith("sampling: --repetition-penalty 5 (from") for line in lines)
    assert any("no effect here: min_p 0.1" in line for line in lines)
    from qwen3_npu.inference.generation_config import read_generation_config, with_defaults

    args = parse(folder, "--task", "do_sample", "--top-k", 9)
    filled, _ = with_defaults(args.generate, read_generation_config([folder]))
    assert (filled.temperature, filled.repetition_penalty) == (theirs.temperature, theirs.repetition_penalty)
    assert (filled.top_k, filled.top_p) == (9, 0.95)
    for broken, message in (
        ({"top_p": "high"}, "top_p is 'high'; a number"),
        ({"eos_token_id": [1.5]}, "eos_token_id"),
    ):
        (folder / "generation_config.json").write_text(json.dumps(broken))
        with pytest.raises(UsageError, match=message):
            read_generation_config([folder])
    other = {"num_beams": 4, "do_sample": False, "max_new_tokens": 5, "early_stopping": False, "stop_strings": ["\x1b"]}
    (folder / "generation_config.json").write_text(json.dumps(other))
    told = read_generation_config([folder]).ignored
    assert told == ("do_sample false", "num_beams 4", "stop_strings ['\\x1b']", "max_new_tokens 5")


def test_without_a_prompt_the_greedy_prompt_of_mindspeed_is_answered(process: Any, model: Path, tmp_path: Path) -> None:
    assert [r["prompt"] for r in run(process, model, tmp_path, "--max-new-tokens", 1)] == ["how are you?"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_not_finite_stop_and_name_the_module(
    dtype: str, process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A down projection of 1e38 overflows in layer 2 of 4; its weights are finite."""
    from safetensors.torch import load_file, save_file

    from qwen3_npu.errors import Stopped

    folder = quiz.write_tokenizer(tiny.write_model(tmp_path / "hf", tiny.arch(vocab_size=800)))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tasks = ["greedy", "do_sample", "beam_search", "beam_search_with_sampling"]
    for task in tasks if dtype == "float32" else tasks[:1]:
        flags = (
            "--task",
            task,
            "--prompt",
            "Once",
            "--max-new-tokens",
            3,
            *(["--bf16"] if dtype == "bfloat16" else []),
        )
        with pytest.raises(Stopped, match=r"not finite .* output of decoder.layers.1.mlp.linear_fc2;"):
            run(process, folder, tmp_path, *flags)


def test_a_weight_that_is_no_number_is_named_at_load(process: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = quiz.write_tokenizer(tiny.write_model(tmp_path / "hf", tiny.arch(vocab_size=800)))
    weights = load_file(folder / "model.safetensors")
    for name, value in (("model.layers.2.mlp.up_proj.weight", "nan"), ("model.norm.weight", "-inf")):
        weights[name].view(-1)[5] = float(value)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        weights[name].view(-1)[5] = 0.0
        with pytest.raises(UsageError, match=f"not finite .*{name}"):
            run(process, folder, tmp_path, "--prompt", "x")
