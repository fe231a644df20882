"""Compare the settings of a checkpoint's training with the flags: refuse, warn of, or ignore a difference. No torch.

`args.rules.resume` says what a change of each argument means. Where Megatron has the argument, the name is the same, so
checkpoints of Megatron are compared too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qwen3_npu import log
from qwen3_npu.args.rules.resume import REASONS, REFUSED, WARNED
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch


class Change(NamedTuple):
    """One setting that differs from the checkpoint, and why it matters."""

    name: str
    before: object
    now: object
    why: str

    def __str__(self) -> str:
        return f"{self.name} {shown_fact(self.before)}, now {shown_fact(self.now)}"


def shown_fact(value: object) -> str:
    """A setting for a message; digests are shortened."""
    words = value if isinstance(value, list | tuple) else [value]
    return " ".join(str(word)[:12] if _is_digest(word) else str(word) for word in words) or "empty"


def _is_digest(word: object) -> bool:
    return isinstance(word, str) and len(word) > 15 and all(c in "0123456789abcdef" for c in word)


def _same(before: object, now: object) -> bool:
    if isinstance(before, str) and isinstance(now, str):  # Megatron's --split is "969, 30, 1"
        return before.replace(" ", "") == now.replace(" ", "")
    if isinstance(before, list | tuple) and isinstance(now, list | tuple):
        return list(before) == list(now)
    return bool(before == now)


def changes(saved: Mapping[str, object], now: Mapping[str, object]) -> tuple[list[Change], list[str]]:
    """The settings that differ, refused ones first, and the names that the checkpoint lacks.

    Args:
        saved: the args in the checkpoint.
        now: the same settings by the flags.
    """
    found, unsaid = [], []
    saved = {"optimizer": "adam", **saved}  # older checkpoints do not say it
    for name, group in (REFUSED | WARNED).items():
        if name not in now:
            continue
        if name not in saved or (name in REFUSED and saved[name] is None):
            unsaid.append(name)
        elif not _same(saved[name], now[name]):
            found.append(Change(name, saved[name], now[name], REASONS[group]))
    return found, unsaid


def model_facts(arch: Qwen3Arch) -> dict[str, object]:
    """The settings of `REFUSED` that belong to the model and that the weights' shapes do not show."""
    facts: dict[str, object] = {"rotary_base": arch.rope_theta, "norm_epsilon": arch.rms_norm_eps}
    facts["rope_scaling"] = str(arch.rope_scaling or "plain RoPE")
    if arch.is_moe:
        facts |= {"moe_router_topk": arch.num_experts_per_tok, "norm_topk_prob": arch.norm_topk_prob}
    return facts


def check_resumed(saved: Mapping[str, object], now: Mapping[str, object], allowed: Sequence[str], where: str) -> None:
    """Refuse or report what has changed since a checkpoint was saved.

    Args:
        allowed: names of --allow-changed.
        where: names the checkpoint.

    Raises:
        UsageError: a setting has changed that must not, and `allowed` does not name it.
    """
    found, unsaid = changes(saved, now)
    refused = [change for change in found if change.name in REFUSED and change.name not in allowed]
    if refused:
        reasons = "; ".join(dict.fromkeys(change.why for change in refused))
        raise UsageError(
            f"{where} was saved with {'; '.join(map(str, refused))} ({reasons}): give the same flags, or --finetune to "
            f"start at step 0 with its weights, or --allow-changed {' '.join(change.name for change in refused)}"
        )
    for change in found:
        allowed_by = "; allowed by --allow-changed" if change.name in REFUSED else ""
        log.warning_once(f"resumed with another setting: {change} ({change.why}{allowed_by})")
    if unsaid:
        log.info(f"not compared with {where}, which does not say them: {', '.join(unsaid)}")


def check_same_model(there: Qwen3Arch, here: Qwen3Arch, what: str) -> None:
    """Warn of other settings of the model. Raises: UsageError: `what` holds tensors of other shapes."""
    if not there.same_weights(here):
        raise UsageError(f"{what} holds {there}; the model is {here}")
    if change := here.unlike(there):
        log.warning_once(f"{what} was trained with {change}")
