"""Flags of `evaluation.py`."""

from __future__ import annotations

import dataclasses
import typing

from qwen3_npu.args.inference import SHARED_FOREIGN, PromptArgs, WeightArgs
from qwen3_npu.args.model import ModelArgs, ShapeArgs
from qwen3_npu.args.parallel import ParallelArgs, RuntimeArgs
from qwen3_npu.args.preprocess import key_mapping
from qwen3_npu.cli import Foreign, flag
from qwen3_npu.errors import UsageError

CUSTOM = "custom"
EVALUATION_TASKS = ("mmlu", "cmmlu", "ceval", "gsm8k", "boolq", "mmlu_ppl", CUSTOM)
LM_EVAL, MINDSPEED = "lm-eval", "mindspeed"
MATCHES = ("exact", "contains", "regex", "choice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """evaluation"""

    task: list[str] = flag(choices=EVALUATION_TASKS, help="benchmarks; custom: conversations with expected answers")
    task_data_path: list[str] = flag(
        metavar="PATH",
        names=("--eval-data-path",),
        help="folder of each task's files (.../mmlu or .../mmlu/test), in the order of --task",
    )
    num_fewshot: int | None = flag(None, minimum=0, help="examples before each question; default: the task's")
    max_eval_samples: int | None = flag(
        None,
        minimum=1,
        names=("--eval-data-size",),
        help="number of questions of each subject, from the first on; default: all",
    )
    subjects: list[str] | None = flag(None, metavar="NAME", help="subjects to evaluate; default: all")
    eval_language: str | None = flag(
        None, choices=["en", "zh"], help="language of the task's texts; default: the task's own"
    )
    scoring: str = flag(
        LM_EVAL,
        choices=[LM_EVAL, MINDSPEED],
        help="lm-eval: as lm-evaluation-harness; mindspeed: answers are generated and searched for a letter",
    )
    match: str = flag(
        "exact",
        choices=MATCHES,
        help="custom: an answer is right if it equals, contains or matches the expected one, "
        "or if that is the likeliest of the choices",
    )
    map_keys: str | None = flag(
        None, metavar="JSON", help="custom: names of columns and roles, as in preprocess_data.py"
    )
    evaluation_batch_size: int | None = flag(
        None, minimum=1, help="answers generated at the same time; default: 8. Scored ones fill --pass-tokens"
    )
    pass_tokens: int | None = flag(
        None, minimum=1, help="tokens scored in one pass; fewer need less memory; default: CPU 256, else 4096"
    )
    max_new_tokens: int | None = flag(None, minimum=1, unit="tokens", help="longest answer; default: the task's")
    log_samples: bool = flag(False, help="write every question with its answer into samples_<task>.jsonl")
    output_dir: str = flag(".", metavar="DIR", help="folder of results.json and the samples")
    resume: bool = flag(True, help="continue a run that was interrupted")

    def __post_init__(self) -> None:
        if len(self.task_data_path) != len(self.task):
            raise UsageError(
                f"--task-data-path has {len(self.task_data_path)} folders for {len(self.task)} tasks; give one for each"
            )
        self.mapping()
        if len(set(self.task)) != len(self.task):
            raise UsageError(f"--task {' '.join(self.task)}: a task is named twice")

    def mapping(self) -> dict[str, object]:
        """--map-keys. Raises: UsageError: it is no JSON object."""
        return key_mapping(self.map_keys)


class EvaluationArgs(typing.NamedTuple):
    """The groups of flags."""

    model: ModelArgs
    shape: ShapeArgs
    parallel: ParallelArgs
    runtime: RuntimeArgs
    weights: WeightArgs
    prompts: PromptArgs
    evaluate: EvaluateArgs

    @property
    def scores(self) -> bool:
        """See `InferenceArgs`."""
        return False

    @property
    def output_dir(self) -> str:
        """Folder of the results."""
        return self.evaluate.output_dir


GROUPS = tuple(typing.get_type_hints(EvaluationArgs).values())

_OTHER_PROMPTS = "--scoring chooses among two ways of asking"

FOREIGN: dict[str, Foreign] = {
    **SHARED_FOREIGN,
    "--broadcast": Foreign("copies of the model that share experts always make the same number of passes"),
    "--temperature": Foreign("the likeliest answer counts", nargs=1),
    "--top-k": Foreign("the likeliest answer counts", nargs=1),
    "--top-p": Foreign("the likeliest answer counts", nargs=1),
    "--instruction-template": Foreign(_OTHER_PROMPTS, nargs=1, refused=True),
    "--alternative-prompt": Foreign(_OTHER_PROMPTS, refused=True),
    "--chain-of-thought": Foreign(_OTHER_PROMPTS, refused=True),
    "--origin-postprocess": Foreign(_OTHER_PROMPTS, refused=True),
}
