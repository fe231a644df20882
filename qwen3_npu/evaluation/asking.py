"""Write questions: with lm-evaluation-harness's texts, with or without a chat template, or with MindSpeed-LLM's."""

from __future__ import annotations

from collections.abc import Mapping

from qwen3_npu.args.evaluation import MINDSPEED
from qwen3_npu.data.text.conversation import ASSISTANT, SYSTEM, USER, Message
from qwen3_npu.errors import UsageError
from qwen3_npu.evaluation.questions import Question
from qwen3_npu.evaluation.task import Task, Texts
from qwen3_npu.inference.text import Writer

# MindSpeed-LLM's file of MMLU examples: two spaces after "about", single line ends.
_MINDSPEED_MMLU = "The following are multiple choice questions (with answers) about  {subject}.\n"


class Asker:
    """Writes a task's questions.

    Attributes:
        delimiter: text between a question and a choice.
    """

    def __init__(self, task: Task, writer: Writer, *, language: str | None, scoring: str) -> None:
        self.task, self.writer, self.scoring = task, writer, scoring
        language = language or next(iter(task.texts))
        if language not in task.texts:
            raise UsageError(f"--eval-language {language}: {task.name} is asked in {', '.join(task.texts)} only")
        self.language, self.texts = language, task.texts[language]
        self.delimiter = "" if writer.args.template else " "

    def context(self, question: Question) -> str:
        """The text before the answer."""
        names = self.task.subjects[question.subject][1]
        subject = names.get(self.language, question.subject)
        if self.scoring == MINDSPEED:
            return self._mindspeed(question, subject)
        description = self.texts.description.format(subject=subject)
        if self.writer.args.template:
            turns = [Message(SYSTEM, description)] if description else []
            for example in question.examples:
                turns += [Message(USER, _filled(self.texts, example)), Message(ASSISTANT, example["answer"])]
            return self.writer.text([*turns, Message(USER, _filled(self.texts, question.columns))])
        shown = "".join(f"{_filled(self.texts, e)} {e['answer']}\n\n" for e in question.examples)
        return description + shown + _filled(self.texts, question.columns)

    def _mindspeed(self, question: Question, subject: str) -> str:
        """Examples as one text and the question after it; with a template, turn by turn."""
        head = self.texts.description.format(subject=subject)
        if self.task.name == "mmlu":
            head = _MINDSPEED_MMLU.format(subject=subject)
        if self.writer.args.template:
            turns = []
            for i, example in enumerate(question.examples):
                text = (head if i == 0 else "") + _filled(self.texts, example)
                turns += [Message(USER, text), Message(ASSISTANT, example["answer"])]
            return self.writer.text(
                [*turns, Message(USER, ("" if turns else head) + _filled(self.texts, question.columns))]
            )
        shown = "\n".join(f"{_filled(self.texts, e)} {e['answer']}" for e in question.examples)
        return f"{head}{shown}\n\n{_filled(self.texts, question.columns)}"


def _filled(texts: Texts, columns: Mapping[str, str]) -> str:
    try:
        return texts.question.format(**columns)
    except KeyError as error:
        raise UsageError(f"a question has no column {error}: {', '.join(columns)}") from None
