"""generation_config.json: the recommended settings of a model. Settings without effect here are logged. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen3_npu import schema
from qwen3_npu.args.inference import GenerateArgs

# Our defaults where neither a flag nor the file says otherwise.
DEFAULTS: Mapping[str, float] = {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.0}
# Further settings of transformers' GenerationConfig that change what is generated, and their values without effect.
_IGNORED: Mapping[str, object] = {
    "min_p": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "penalty_alpha": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": {},
    "do_sample": True,  # --task chooses
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "length_penalty": 1,
    "early_stopping": False,
    "exponential_decay_length_penalty": None,
    "stop_strings": [],
    "token_healing": False,
    "guidance_scale": 1,
    "max_new_tokens": None,
    "max_length": 20,
    "max_time": None,
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The content of the file.

    Attributes:
        path: path of the file; None if there is none.
        ends: tokens that end an answer.
        sampling: the settings among `DEFAULTS` that it has.
        ignored: settings that change what transformers generates and that have no effect here.
    """

    path: Path | None = None
    ends: tuple[int, ...] = ()
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def read_generation_config(folders: Sequence[Path]) -> GenerationConfig:
    """Read the file from the first folder that has one.

    Raises:
        UsageError: a value has another type or is out of range.
    """
    path = next((f for folder in folders if (f := folder / "generation_config.json").exists()), None)
    if path is None:
        return GenerationConfig()
    found = schema.read_record(path)
    ends = found.fields.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    sampling = {
        "temperature": found.number("temperature", None, least=0),
        "top_k": found.integer("top_k", None, least=0),
        "top_p": found.number("top_p", None, least=0, most=1),
        "repetition_penalty": found.number("repetition_penalty", None, least=0),
    }
    ignored = tuple(
        f"{name} {schema.shown(found.fields[name])}"
        for name, neutral in _IGNORED.items()
        if found.fields.get(name) is not None and found.fields[name] != neutral
    )
    return GenerationConfig(
        path,
        tuple(schema.integer(token, f"{path}: eos_token_id", least=0) for token in listed),
        {name: value for name, value in sampling.items() if value is not None},
        ignored,
    )


def with_defaults(args: GenerateArgs, config: GenerationConfig) -> tuple[GenerateArgs, list[str]]:
    """The flags, completed from the file and then from the defaults; and log lines about the file's settings.

    Raises:
        UsageError: the values do not fit the tasks.
    """
    open_ones = [name for name in DEFAULTS if getattr(args, name) is None]
    taken = {name: config.sampling[name] for name in open_ones if name in config.sampling}
    values = {name: taken.get(name, DEFAULTS[name]) if name in open_ones else getattr(args, name) for name in DEFAULTS}
    filled = dataclasses.replace(
        args,
        temperature=float(values["temperature"]),
        top_k=int(values["top_k"]),
        top_p=float(values["top_p"]),
        repetition_penalty=float(values["repetition_penalty"]),
    )
    if not any("sampl" in task or task == "chat" for task in args.task):  # the likeliest token is taken
        taken = {name: value for name, value in taken.items() if name == "repetition_penalty" and value != 1}
    lines = []
    if taken:
        shown = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in taken.items())
        lines.append(f"sampling: {shown} (from {config.path}; flags say otherwise)")
    if config.ignored:
        lines.append(f"{config.path}: no effect here: {', '.join(config.ignored)}")
    return filled, lines
