"""evaluation.py: scores equal lm-evaluation-harness, files and failures."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quiz
import tiny
from qwen3_npu.errors import UsageError
from qwen3_npu.platform import select_platform

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    folder = tiny.write_model(tmp_path_factory.mktemp("model") / "hf", tiny.arch("tied", vocab_size=800))
    return quiz.write_tokenizer(folder)


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quiz.write_mmlu(tmp_path_factory.mktemp("mmlu") / "data")


def evaluate(process: Any, model: Path, out: Path, *flags: object) -> dict[str, Any]:
    """results.json of an evaluation in this process; samples by task under "samples"."""
    from qwen3_npu import cli
    from qwen3_npu.args.evaluation import FOREIGN, GROUPS, EvaluationArgs
    from qwen3_npu.evaluation.run import evaluate as run
    from qwen3_npu.inference.plan import plan_inference

    words = ["--load", str(model), "--output-dir", str(out), "--log-samples", "--device", "cpu", *map(str, flags)]
    args = EvaluationArgs(*cli.parse("test", "", GROUPS, FOREIGN, argv=words).groups)
    out.mkdir(exist_ok=True)
    plan = plan_inference(args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=1)
    run(select_platform("cpu"), process, args, plan)
    results = json.loads((out / "results.json").read_text())
    files = out.glob("samples_*.jsonl")
    results["samples"] = {f.stem[8:]: [json.loads(x) for x in f.read_text().splitlines()] for f in files}
    return results


def harness(model: Path, mmlu: Path, tmp_path: Path, **options: Any) -> dict[str, Any]:
    """What lm-evaluation-harness says about the same files."""
    lm_eval = pytest.importorskip("lm_eval", reason="the comparison needs lm-evaluation-harness (pip install lm-eval)")
    pytest.importorskip("datasets", reason="lm-evaluation-harness reads files with `datasets`")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for subject in quiz.SUBJECTS:
        for split in ("dev", "test"):
            with (mmlu / split / f"{subject}_{split}.csv").open(newline="") as stream:
                rows = [{"question": q, "choices": c, "answer": "ABCD".index(a)} for q, *c, a in csv.reader(stream)]
            (tmp_path / f"{subject}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{subject}.yaml").write_text(
            f"""
task: local_{subject}
dataset_path: json
dataset_kwargs:
  data_files:
    dev: {tmp_path}/{subject}_dev.jsonl
    test: {tmp_path}/{subject}_test.jsonl
test_split: test
fewshot_split: dev
fewshot_config:
  sampler: first_n
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about {subject.replace("_", " ")}.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. \\
  {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
"""
        )
    loaded = AutoModelForCausalLM.from_pretrained(model)
    lm = HFLM(pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=4, device="cpu")
    return lm_eval.simple_evaluate(
        lm,
        tasks=[f"local_{subject}" for subject in quiz.SUBJECTS],
        num_fewshot=5,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        cache_requests=False,
        **options,
    )


@pytest.mark.parametrize("positions", [4096, 300], ids=["beginnings are shared", "prompts lose their beginnings"])
def test_mmlu_equals_lm_evaluation_harness(
    positions: int, process: Any, mmlu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = tiny.arch("tied", vocab_size=800, max_position_embeddings=positions)
    model = quiz.write_tokenizer(tiny.write_model(tmp_path / "hf", arch))
    compare(process, model, mmlu, tmp_path, monkeypatch)


def test_real_mmlu_equals_lm_evaluation_harness(
    process: Any, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write_model(tmp_path / "hf", tiny.arch(vocab_size=151936, max_position_embeddings=2048))
    for file in (real_data / "qwen3-tokenizer").iterdir():
        shutil.copy(file, folder)
    compare(process, folder, real_data / "mmlu", tmp_path, monkeypatch, limit=2)


def compare(
    process: Any,
    model: Path,
    mmlu: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int | None = None,
) -> None:
    """Choices and log-likelihoods of every question, and the scores."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    theirs = harness(model, mmlu, tmp_path, limit=limit)
    expected = {
        (subject, sample["doc_id"]): sample
        for subject in quiz.SUBJECTS
        for sample in theirs["samples"][f"local_{subject}"]
    }
    most = ("--max-eval-samples", limit) if limit else ()
    # How a pass is cut is proved with short questions.
    for flags in ((),) if limit else ((), ("--no-prefix-cache", "--pass-tokens", 300)):
        flags = ("--task", "mmlu", "--task-data-path", mmlu, "--subjects", *quiz.SUBJECTS, *most, *flags)
        ours = evaluate(process, model, tmp_path / "out", *flags)
        samples = ours["samples"]["mmlu"]
        assert len(samples) == len(expected)
        for sample in samples:
            other = expected[sample["subject"], sample["number"]]
            likelihoods = [response[0] for response in other["filtered_resps"]]
            assert sample["loglikelihoods"] == pytest.approx(likelihoods, abs=1e-4)
            assert sample["acc"] == other["acc"]
        scores = ours["results"]["mmlu"]["metrics"]["acc"]["subjects"]
        for subject in quiz.SUBJECTS:
            assert scores[subject]["mean"] == pytest.approx(theirs["results"][f"local_{subject}"]["acc,none"])
        assert len({s["answer"] for s in samples}) > 1, "a model that always says the same proves little"


def test_texts_of_all_subjects_are_those_of_lm_evaluation_harness() -> None:
    """The descriptions that its files have, for the tasks that it has."""
    lm_eval = pytest.importorskip("lm_eval", reason="the comparison needs lm-evaluation-harness (pip install lm-eval)")
    import yaml

    from qwen3_npu.evaluation.tasks import TASKS

    folder = Path(lm_eval.__file__).parent / "tasks"
    files = {"mmlu": "mmlu/default/mmlu_*.yaml", "cmmlu": "cmmlu/cmmlu_*.yaml", "ceval": "ceval/ceval-valid_*.yaml"}
    for name, pattern in files.items():
        task = TASKS[name]
        language, texts = next(iter(task.texts.items()))
        found = [yaml.load(f.read_text(encoding="utf-8"), yaml.BaseLoader) for f in folder.glob(pattern)]
        described = {entry["dataset_name"]: entry["description"] for entry in found if "description" in entry}
        ours = {s: texts.description.format(subject=names[language]) for s, (_, names) in task.subjects.items()}
        assert ours == described


def test_mindspeed_scoring_generates_and_searches(process: Any, model: Path, mmlu: Path, tmp_path: Path) -> None:
    flags = ("--task", "mmlu", "--task-data-path", mmlu / "test", "--scoring", "mindspeed", "--num-fewshot", 2)
    samples = evaluate(process, model, tmp_path, *flags)["samples"]["mmlu"]
    assert len(samples) == 30
    first = samples[0]["prompt"]
    assert first.startswith("The following are multiple choice questions (with answers) about  anatomy.\n")
    assert first.count("Answer:") == 3
    assert first.count("Answer: ") == 2
    assert "\nAnswer: B\n\n" in first


@pytest.mark.parametrize(
    ("said", "letter"),
    [(" A", "A"), ("\n B. because", "B"), ("the C. is right", "C"), ("|", "|"), ("the answer", ""), ("E", "")],
)
def test_the_letter_that_mindspeed_reads(said: str, letter: str) -> None:
    from qwen3_npu.evaluation.extract import mindspeed_letter

    assert mindspeed_letter(said) == letter


@pytest.mark.parametrize(
    ("said", "strict", "flexible"),
    [
        ("so 2+2=4\n#### 1,234.", True, True),
        ("the answer is $1234", False, True),
        ("#### 12", False, False),
        ("no number", False, False),
    ],
)
def test_gsm8k_filters(said: str, strict: bool, flexible: bool) -> None:
    from qwen3_npu.evaluation.extract import filtered, same_number
    from qwen3_npu.evaluation.tasks import TASKS

    gold = "48/2 = 24\n#### 1234"
    found = {name: same_number(filtered(said, *rule), gold) for name, rule in TASKS["gsm8k"].filters.items()}
    assert found == {"strict-match": strict, "flexible-extract": flexible}


def test_gsm8k_and_boolq(process: Any, model: Path, tmp_path: Path) -> None:
    gsm8k, boolq = tmp_path / "gsm8k", tmp_path / "boolq"
    for folder, name, record in (
        (gsm8k, "test", {"question": "How many?", "answer": "one\n#### 1"}),
        (gsm8k, "train", {"question": "How much?", "answer": "two\n#### 2"}),
        (boolq, "dev", {"question": "is it", "passage": "It is.", "answer": True}),
    ):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 6)
    flags = ("--task", "gsm8k", "boolq", "--task-data-path", gsm8k, boolq, "--max-new-tokens", 3)
    results = evaluate(process, model, tmp_path / "out", *flags)
    sample = results["samples"]["gsm8k"][0]
    assert sample["prompt"] == "Question: How much?\nAnswer: two\n#### 2\n\n" * 5 + "Question: How many?\nAnswer:"
    sample = results["samples"]["boolq"][0]
    assert sample["prompt"] == "It is.\nQuestion: is it?\nAnswer:"
    assert sample["choices"] == ["no", "yes"]
    assert sample["expected"] == "yes"


def test_custom_conversations(process: Any, model: Path, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "Is it?"}]
    records: list[dict] = [
        {"messages": question, "answer": "yes", "choices": ["no", "yes"], "match": "choice", "category": "a"},
        {"messages": question, "answer": "no", "choices": ["no", "yes"], "match": "choice", "category": "b"},
        {"messages": question, "answer": ".*", "match": "regex"},
        {"messages": [*question, {"role": "assistant", "content": "never said"}]},
        {"instruction": "Say", "input": "this", "output": "", "match": "contains"},
    ]
    file = tmp_path / "cases.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ("--task", "custom", "--task-data-path", file, "--prompt-type", "qwen3", "--max-new-tokens", 4)
    results = evaluate(process, model, tmp_path / "out", *flags)
    right = [sample["acc"] for sample in results["samples"]["custom"]]
    assert sum(right[:2]) == 1, "the same question twice: one of two opposite answers is right"
    assert right[2:] == [1.0, 0.0, 1.0]
    total = results["results"]["custom"]["metrics"]["acc"]["total"]
    assert (total["mean"], total["count"]) == (0.6, 5)


def test_pieces_are_tokens_of_the_whole(model: Path) -> None:
    from qwen3_npu.args.inference import PromptArgs
    from qwen3_npu.data.text.tokenizer import open_tokenizer
    from qwen3_npu.evaluation.paragraphs import ParagraphEncoder, paragraphs
    from qwen3_npu.inference.text import Writer

    text = "Who?\n\nA.\n\n\nB \n\n C\n\n1\n\n\u00e9t\u00e9\n\n# x\n\nend"
    assert paragraphs(text) == ["Who?\n\n", "A.\n\n\n", "B \n\n C\n\n", "1\n\n\u00e9t\u00e9\n\n# x\n\n", "end"]
    encode = ParagraphEncoder(Writer(open_tokenizer(str(model)), PromptArgs()))
    whole = encode.encoder.encode([text]).ids.tolist()
    assert encode([text]) == [whole]
    assert encode.safe
    assert [token for piece in paragraphs(text) for token in encode([piece])[0]] == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "mlu", "--task-data-path", "x"], "invalid choice: 'mlu'"),
        (["--task", "mmlu", "--task-data-path", "{out}"], "abstract_algebra_test.csv for --task mmlu is neither in"),
        (["--task", "mmlu", "--task-data-path", "{mmlu}", "--num-fewshot", "6"], "has 5 examples"),
        (["--task", "mmlu", "--task-data-path", "{mmlu}", "--subjects", "anatomi"], "did you mean anatomy?"),
        (["--task", "mmlu", "--task-data-path", "{mmlu}", "--eval-language", "zh"], "is asked in en only"),
        (["--task", "gsm8k", "--task-data-path", "x", "--scoring", "mindspeed"], "is for mmlu, cmmlu and ceval"),
        (["--task", "mmlu", "boolq", "--task-data-path", "x"], "has 1 folders for 2 tasks"),
        (["--task", "mmlu", "--task-data-path", "{mmlu}", "--chain-of-thought"], "drop the flag"),
    ],
)
def test_failures_are_refusals(
    flags: list[str], message: str, process: Any, model: Path, mmlu: Path, tmp_path: Path, capsys: Any
) -> None:
    words = [flag.format(out=tmp_path, mmlu=mmlu) for flag in flags]
    with pytest.raises((UsageError, SystemExit)) as refused:
        evaluate(process, model, tmp_path, *words)
    assert message in str(refused.value) + capsys.readouterr().err


def test_a_broken_file_ends_the_command(model: Path, tmp_path: Path) -> None:
    """Status 2, no traceback, no results; what a good file gives, test_generation_examples.py shows."""
    script = [sys.executable, str(ROOT / "evaluation.py"), "--load", str(model), "--device", "cpu", "--task", "mmlu"]
    (tmp_path / "anatomy_test.csv").write_text("only,three,cells\n")
    script += ["--output-dir", str(tmp_path), "--task-data-path", str(tmp_path), "--num-fewshot", "0"]
    bad = subprocess.run(script, capture_output=True, text=True)
    assert bad.returncode == 2
    assert "anatomy_test.csv cannot be read as a file of mmlu" in bad.stderr
    assert "Traceback" not in bad.stderr
    assert not (tmp_path / "results.json").exists()


def test_boolq_examples_are_those_of_the_harness(tmp_path: Path) -> None:
    """One more is drawn than is shown, and the question itself is never among them."""
    samplers = pytest.importorskip("lm_eval.api.samplers", reason="the comparison needs lm-evaluation-harness")
    from qwen3_npu.evaluation.questions import load_questions
    from qwen3_npu.evaluation.tasks import TASKS

    rows = [{"question": f"is it {n % 9}", "passage": "It is.", "answer": bool(n % 2)} for n in range(12)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_questions(TASKS["boolq"], str(tmp_path), shots=5, most=None, subjects=None)
    theirs = samplers.ContextSampler(rows, rnd=1234)
    expected = [theirs.sample(5, eval_doc=row) for row in rows]
    assert [[e["question"] for e in q.examples] for q in found] == [
        [e["question"] for e in drawn] for drawn in expected
    ]
    with pytest.raises(UsageError, match=r"--num-fewshot 12: .* has 12 examples .one more is drawn"):
        load_questions(TASKS["boolq"], str(tmp_path), shots=12, most=None, subjects=None)


@pytest.mark.parametrize("task", ["mmlu", "custom"])
def test_scores_that_are_no_numbers_stop_the_evaluation(task: str, process: Any, mmlu: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from qwen3_npu.errors import Stopped

    folder = quiz.write_tokenizer(tiny.write_model(tmp_path / "hf", tiny.arch(vocab_size=800)))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.self_attn.o_proj.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps({"instruction": "hi", "output": "yes"}) + "\n")
    data = mmlu if task == "mmlu" else cases
    with pytest.raises(Stopped, match=r"output of decoder.layers.2.self_attention.linear_proj;"):
        evaluate(process, folder, tmp_path / "out", "--task", task, "--task-data-path", data)
    assert not (tmp_path / "out" / "results.json").exists()


def test_prompts_that_lose_their_beginning_are_counted(
    process: Any, mmlu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("qwen3_npu.log.warning_once", warnings.append)
    arch = tiny.arch("tied", vocab_size=800, max_position_embeddings=200)
    model = quiz.write_tokenizer(tiny.write_model(tmp_path / "hf", arch))
    from tokenizers import Tokenizer

    flags = ("--task", "mmlu", "--task-data-path", mmlu, "--subjects", "anatomy")
    samples = evaluate(process, model, tmp_path / "out", *flags)["samples"]["mmlu"]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    # Context and choice without its last token are what goes through the model.
    longer = sum(len(tokenizer.encode(f"{s['prompt']} A").ids) - 1 > 200 for s in samples)
    assert longer
    assert any(
        w.startswith(f"mmlu: {longer} of {len(samples)} prompts are longer than the model's 200") for w in warnings
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_task_is_said_once_under_torchrun(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 says it in a line; every rank leaves it where torchrun shows the first error."""
    from qwen3_npu import cli
    from qwen3_npu.args.evaluation import FOREIGN, GROUPS, EvaluationArgs
    from qwen3_npu.inference.start import start

    errors = tmp_path / "error.json"
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(errors))
    work = "qwen3_npu.evaluation.run"
    for words in (
        ["--task", "mlu", "--task-data-path", "x", "--load", "x"],
        ["--task", "mmlu", "--task-data-path", "x"],
    ):
        monkeypatch.setattr(sys, "argv", ["evaluation.py", *words])
        with pytest.raises(SystemExit) as ended:
            cli.run(
                "evaluation.py",
                lambda: start("evaluation.py", "", EvaluationArgs, groups=GROUPS, foreign=FOREIGN, work=work),
            )
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.count("error:") == (1 if rank == 0 else 0)
        assert "Traceback" not in said
        expected = "invalid choice: 'mlu'" if "mlu" in words else "required: --load"
        assert expected in json.loads(errors.read_text())["message"]["message"]
