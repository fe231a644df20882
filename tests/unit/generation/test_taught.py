"""One template from preprocessing to evaluation: what the data were written with is how the checkpoint is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import quiz
import tiny
from qwen3_npu import cli, log
from qwen3_npu.args import evaluation, inference, preprocess
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.plan import plan_inference
from qwen3_npu.platform import select_platform

# What training showed the model before its answer: MindSpeed-LLM's strings.
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QWEN = f"{SYSTEM}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
QWEN3 = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_model(tmp_path_factory.mktemp("model") / "hf", tiny.arch(vocab_size=800))
    return quiz.write_tokenizer(folder)


@pytest.fixture(scope="module")
def trained(process: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prompt type -> a checkpoint after one step on data that were written with it."""
    from qwen3_npu.data.preprocess.run import preprocess as run
    from qwen3_npu.parity.measure import trainer

    folder = tmp_path_factory.mktemp("trained")
    (folder / "raw.jsonl").write_text(json.dumps({"instruction": "hi", "output": "yes"}) + "\n")
    for name in ("qwen", "qwen3"):
        words = ["--input", folder / "raw.jsonl", "--output-prefix", folder / name, "--workers", "1"]
        words += ["--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", name]
        words += ["--tokenizer-name-or-path", model]
        run(preprocess.PreprocessArgs(*cli.parse("", "", preprocess.GROUPS, argv=list(map(str, words))).groups))
        flags = ["--load", model, "--save", folder / f"save {name}", "--data-path", folder / name, "--stage", "sft"]
        flags += ["--variable-seq-lengths", "--tokenizer-name-or-path", model, "--split", "100,0,0", "--device", "cpu"]
        flags += ["--eval-iters", "0"]
        flags += ["--seq-length", "64", "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4"]
        with trainer(select_platform("cpu"), process, list(map(str, flags))) as training:
            training.step()
            training.saver.save(training.position)
            training.saver.finish()
    return {name: folder / f"save {name}" for name in ("qwen", "qwen3")}


def planned(checkpoint: Path, model: Path, *flags: str) -> Any:
    words = ["--load", str(checkpoint), "--hf-dir", str(model), "--tokenizer-name-or-path", str(model), *flags]
    parsed = cli.parse("", "", inference.GROUPS, inference.FOREIGN, argv=[*words, "--prompt", "hi", "--device", "cpu"])
    args = inference.InferenceArgs(*parsed.groups)
    return args, plan_inference(args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=1)


def asked(process: Any, checkpoint: Path, model: Path, out: Path, *flags: str) -> str:
    """The prompt that inference.py wrote."""
    from qwen3_npu.inference.run import generate

    args, plan = planned(checkpoint, model, "--output-dir", str(out), "--max-new-tokens", "1", *flags)
    generate(select_platform("cpu"), process, args, plan)
    return str(json.loads((out / "text_generation_result.jsonl").read_text())["prompt"])


def test_a_checkpoint_is_asked_as_it_was_taught(
    process: Any, model: Path, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(log, "warning_once", warnings.append)
    for flags in ((), ("--prompt-type", "auto")):
        assert asked(process, trained["qwen"], model, tmp_path, *flags) == QWEN
        assert asked(process, trained["qwen3"], model, tmp_path, *flags) == QWEN3
    assert not warnings
    assert asked(process, trained["qwen"], model, tmp_path, "--prompt-type", "qwen3") == QWEN3
    assert asked(process, trained["qwen"], model, tmp_path, "--no-chat-template") == "hi"
    assert [w.split(":")[0] for w in warnings] == ["--prompt-type qwen3", "--prompt-type none"]
    assert all("trained with qwen;" in w for w in warnings)
    assert asked(process, model, model, tmp_path) == "hi", "a model that says nothing is asked in plain text"


def test_a_hugging_face_export_is_asked_as_its_training_was(
    process: Any, model: Path, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import convert_ckpt

    export = tmp_path / "hf"
    flags = ["--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", trained["qwen"], "--save-dir", export]
    monkeypatch.setattr("sys.argv", ["convert_ckpt.py", *map(str, flags), "--jobs", "1"])
    assert not convert_ckpt.main()
    assert asked(process, export, export, tmp_path) == QWEN
    (export / "qwen3_npu_prompts.json").write_text('{"prompt_type": "chatglm"}')
    with pytest.raises(UsageError, match=r"qwen3_npu_prompts.json: prompt_type 'chatglm' .* is not known"):
        planned(export, export)


def test_custom_evaluation_uses_the_recorded_template(
    process: Any, model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    from qwen3_npu.evaluation.run import evaluate

    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps({"instruction": "hi", "output": "yes"}) + "\n")
    words = ["--load", trained["qwen"], "--hf-dir", model, "--tokenizer-name-or-path", model, "--log-samples"]
    words += ["--task", "custom", "--eval-data-path", cases, "--output-dir", tmp_path, "--max-new-tokens", "1"]
    parsed = cli.parse("", "", evaluation.GROUPS, evaluation.FOREIGN, argv=[*map(str, words), "--device", "cpu"])
    args = evaluation.EvaluationArgs(*parsed.groups)
    plan = plan_inference(args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=1)
    evaluate(select_platform("cpu"), process, args, plan)
    assert json.loads((tmp_path / "samples_custom.jsonl").read_text())["prompt"] == QWEN
    assert json.loads((tmp_path / "results.json").read_text())["results"]["custom"]["template"] == "qwen"


def test_another_tokenizer_is_noticed_before_loading(
    model: Path, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(log, "warning_once", warnings.append)
    content = json.loads((model / "tokenizer.json").read_text())
    first, second = list(content["model"]["vocab"])[5:7]
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps(content))
    (other / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text())
    planned(trained["qwen3"], model, "--tokenizer-name-or-path", str(other))
    assert len(warnings) == 1
    assert "is not the tokenizer that the checkpoint's training data were made with" in warnings[0]
    vocabulary[first] = 800
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="has tokens up to 800, but the model has only 800; give the model's own"):
        planned(trained["qwen3"], model, "--tokenizer-name-or-path", str(other))


def test_the_start_and_the_model_card_say_what_was_taught(
    trained: dict[str, Path], model: Path, tmp_path: Path
) -> None:
    from qwen3_npu.args import convert as flags
    from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
    from qwen3_npu.checkpoint.convert.run import convert
    from qwen3_npu.data.train.data_path import DataFacts
    from qwen3_npu.training.prepare.taught import start_line

    data = trained["qwen3"].parent / "qwen3"
    words = ["--stage", "sft", "--lr", "1", "--train-iters", "1", "--data-path", str(data), "--seq-length", "64"]
    (line,) = start_line(PretrainArgs(*cli.parse("", "", GROUPS, argv=words).groups), DataFacts(9, truncated=2))
    assert line == (
        "sft: template qwen3, loss normalization token mean; MindSpeed-LLM's is micro-batch mean: "
        "--loss-normalization micro-batch; 2 of 9 samples truncated to --seq-length 64"
    )
    groups = (flags.ConvertArgs, flags.TargetArgs, flags.LoraConvertArgs, flags.LegacyConvertArgs)
    words = ["--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", str(trained["qwen3"])]
    score = {"count": 4, "mean": 0.5, "stderr": None}
    (trained["qwen3"] / "results.json").write_text(
        json.dumps({"results": {"mmlu": {"metrics": {"acc": {"total": score}}}}})
    )
    parsed = cli.parse("", "", groups, argv=[*words, "--save-dir", str(tmp_path), "--jobs", "1"])
    convert(*parsed.groups)
    card = (tmp_path / "README.md").read_text()
    assert "| stage | 'sft' |\n| steps | 1 |" in card
    assert "| prompts are written as | 'qwen3' |" in card
    assert "| data | qwen3 (SHA-256 '" in card
    assert "| mmlu | acc | 4 | 50.00 % |" in card
    assert str(tmp_path.parent) not in card, "paths are nobody's business"
    assert card.splitlines()[:2] == ["---", "library_name: transformers"]
    (tmp_path / "README.md").write_text("mine")
    convert(*cli.parse("", "", groups, argv=[*words, "--save-dir", str(tmp_path), "--jobs", "1", "--overwrite"]).groups)
    assert (tmp_path / "README.md").read_text() == "mine"
