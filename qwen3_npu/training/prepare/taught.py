"""The prompt settings of an instruction training. Checkpoints store them, so that inference uses the same prompts."""

from __future__ import annotations

from qwen3_npu import log
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.data.text.prompt_types import resolved
from qwen3_npu.data.text.tokenizer import TokenizerFolder, open_tokenizer
from qwen3_npu.data.train.data_path import DataFacts, blend
from qwen3_npu.data.train.token_record import find_record
from qwen3_npu.progress import human


def taught(args: PretrainArgs) -> dict[str, str]:
    """Entries of the saved args: prompt_type, enable_thinking (true, false, none) and tokenizer_digest.

    They come from the records beside the data (`token_record.made`), or, without records, from the training's
    --prompt-type, which MindSpeed-LLM's scripts give. Empty for text, and if the data sets differ.
    """
    if not args.data.is_instruction:
        return {}
    prefixes = blend(args.data.data_path)[0]
    records = [find_record(f"{prefix}_packed_input_ids_document") for prefix in prefixes]
    made = [dict(record.made) if record else {} for record in records]
    folder = args.data.tokenizer_name_or_path
    tokenizer = open_tokenizer(folder) if folder else None
    given, thinking = args.instruction.prompt_type, args.instruction.enable_thinking.lower()
    if given is not None and tokenizer is not None:
        given = resolved(given, tokenizer)
    if any(one.get("prompt_type") != made[0].get("prompt_type") for one in made):
        log.warning_once("--data-path: the data sets were written with different --prompt-type; none is recorded")
        return {}
    found = made[0].get("prompt_type")
    if found is None:
        if given in (None, "auto"):
            return {}
        return {"prompt_type": given, "enable_thinking": thinking, **_digest(made[0], tokenizer)}
    if given not in (None, "auto", found):
        log.warning_once(f"--prompt-type {given}: the data were written with {found}, which is what is learned")
    thinking = str(made[0].get("enable_thinking", "none"))
    return {"prompt_type": str(found), "enable_thinking": thinking, **_digest(made[0], tokenizer)}


def start_line(args: PretrainArgs, facts: DataFacts | None) -> list[str]:
    """A line about template, loss and truncation of a fine-tuning on conversations; empty for text.

    Args:
        facts: of the samples; None: unknown yet (raw data in a dry run).
    """
    data = args.data
    if not (data.is_instruction or data.is_preference):
        return []
    parts = [f"template {_template(args, is_prepared=facts is not None)}"]
    if data.is_instruction:
        mean = "token mean; MindSpeed-LLM's is micro-batch mean: --loss-normalization micro-batch"
        parts.append(f"loss normalization {mean if args.train.loss_normalization == 'token' else 'micro-batch mean'}")
    if facts is not None and data.is_instruction:
        shares = f"{human(facts.truncated)} of {human(facts.samples)} samples"
        parts.append(f"{shares} truncated to --seq-length {args.train.seq_length}")
    first = ", ".join(parts[:2]) if len(parts) > 1 else parts[0]
    return [f"{data.stage if data.is_preference else 'sft'}: {'; '.join([first, *parts[2:]])}"]


def _template(args: PretrainArgs, *, is_prepared: bool) -> str:
    found = taught(args) if is_prepared and args.data.is_instruction else {}
    if "prompt_type" in found:
        thinking = found.get("enable_thinking", "none")
        return found["prompt_type"] + (f" (--enable-thinking {thinking})" if thinking != "none" else "")
    return args.instruction.prompt_type or "unknown (the data do not say it)"


def _digest(made: dict[str, object], tokenizer: TokenizerFolder | None) -> dict[str, str]:
    digest = made.get("tokenizer") or (tokenizer.identity if tokenizer else None)
    return {"tokenizer_digest": str(digest)} if digest else {}
