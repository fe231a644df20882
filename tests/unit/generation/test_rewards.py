"""Reward models: read and scored as transformers does, refused where text is wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import quiz
import tiny
from qwen3_npu import cli
from qwen3_npu.args.inference import FOREIGN, GROUPS, InferenceArgs
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.plan import InferencePlan, plan_inference
from qwen3_npu.model.arch import from_hf_config, read_hf_config, to_hf_config
from qwen3_npu.platform import select_platform

RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]},
    {"prompt": "Who are you?", "response": "A lighthouse keeper"},
    {"conversations": [{"from": "human", "value": "When?"}, {"from": "gpt", "value": "Now"}]},
]
PAIRS: list[dict[str, Any]] = [
    {"instruction": "Sing", "chosen": "la la", "rejected": "no"},
    {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello"},
        "rejected": {"from": "gpt", "value": "Go away, now"},
    },
]


@pytest.fixture(scope="module", params=["untied", "moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = tiny.arch(request.param, vocab_size=800, bos_token_id=799).as_reward()
    return quiz.write_tokenizer(tiny.write_model(tmp_path_factory.mktemp("reward") / "hf", arch))


def planned(model: Path, *flags: object) -> tuple[InferenceArgs, InferencePlan]:
    words = ["--load", str(model), "--device", "cpu", *map(str, flags)]
    args = InferenceArgs(*cli.parse("test", "", GROUPS, FOREIGN, argv=words).groups)
    parts = args.model, args.shape, args.parallel, args.weights
    return args, plan_inference(*parts, prompts=args.prompts, world_size=1, scores=args.scores)


def test_rewards_are_those_of_transformers(process: Any, model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from qwen3_npu.inference.rewards.run import score_answers

    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in [*RECORDS, *PAIRS]))
    flags = ("--task", "score", "--predict-data", data, "--prompt-type", "qwen3", "--output-dir", tmp_path)
    args, plan = planned(model, *flags, "--predict-batch-size", 2)
    score_answers(select_platform("cpu"), process, args, plan)
    found = [json.loads(line) for line in (tmp_path / "reward_result.jsonl").read_text().splitlines()]
    theirs = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    assert theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == 799
    tokenizer = AutoTokenizer.from_pretrained(model)

    def expected(text: str) -> float:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            return theirs(input_ids=ids).logits.item()

    assert len(found) == len(RECORDS) + len(PAIRS)
    for record in found[: len(RECORDS)]:
        assert record["reward"] == pytest.approx(expected(record["prompt"] + record["answer"]), abs=1e-5)
    assert "There." in found[0]["answer"]
    assert "Where?" in found[0]["prompt"]
    for record in found[len(RECORDS) :]:
        chosen, rejected = (expected(record["prompt"] + record[name]) for name in ("chosen", "rejected"))
        assert (record["reward_chosen"], record["reward_rejected"]) == pytest.approx((chosen, rejected), abs=1e-5)
        assert record["margin"] == pytest.approx(chosen - rejected, abs=2e-5)


def test_config_json_says_a_reward_model_and_is_read_back(model: Path) -> None:
    config = read_hf_config(model)
    (name,) = config["architectures"]
    assert name == (
        "Qwen3MoeForSequenceClassification" if "num_experts" in config else "Qwen3ForSequenceClassification"
    )
    arch = from_hf_config(config)
    assert arch.reward
    assert to_hf_config(arch, config, "float32") == config
    with pytest.raises(UsageError, match="ForSequenceClassification of 2 labels; a reward model with 1 is read"):
        from_hf_config({**config, "id2label": {"0": "bad", "1": "good"}})


def test_text_is_not_generated_from_a_reward_model(model: Path) -> None:
    with pytest.raises(
        UsageError, match=r"is a reward model's: it gives rewards \(inference.py --task score\), no text"
    ):
        planned(model, "--task", "greedy", "--prompt", "hi")


@pytest.mark.parametrize("flags", [["--prompt", "hi"], ["greedy", "--predict-data", "x"], []])
def test_scores_need_a_file_and_stand_alone(flags: list[str], model: Path) -> None:
    with pytest.raises(UsageError, match="--task score stands alone and reads the answers of a file"):
        planned(model, "--task", "score", *flags)


def test_a_record_without_an_answer_is_named(process: Any, model: Path, tmp_path: Path) -> None:
    from qwen3_npu.inference.rewards.run import score_answers

    data = tmp_path / "q.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "Where?"}]}) + "\n")
    args, plan = planned(model, "--task", "score", "--predict-data", data, "--prompt-type", "qwen3")
    with pytest.raises(UsageError, match=r"q\.jsonl, line 1: the last message is the user's; there is no answer"):
        score_answers(select_platform("cpu"), process, args, plan)
