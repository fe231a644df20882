"""Extract answers from generated text: lm-evaluation-harness's filters, MindSpeed-LLM's letters."""

from __future__ import annotations

import re

_INVALID = "[invalid]"
# MindSpeed-LLM's expressions; the class has "|" in it there too.
_MINDSPEED = (re.compile(r".*(?P<answer>[A|B|C|D])\..*"), re.compile(r"(?P<answer>[A|B|C|D])"))
_IGNORED = (r",", r"\$", r"(?s).*#### ", r"\.$")


def filtered(text: str, pattern: str, which: int) -> str:
    """The `which`-th match of a pattern, or "[invalid]" (lm-evaluation-harness's regex filter)."""
    found = re.findall(pattern, text)
    if not found:
        return _INVALID
    match = found[which]
    if isinstance(match, tuple):
        match = next((group for group in match if group), _INVALID)
    return match.strip()


def same_number(said: str, gold: str) -> bool:
    """Equality without the characters that GSM8K's metric ignores (lm-evaluation-harness's exact_match)."""
    for pattern in _IGNORED:
        said, gold = re.sub(pattern, "", said), re.sub(pattern, "", gold)
    return said.lower() == gold.lower()


def mindspeed_letter(text: str) -> str:
    """The letter that MindSpeed-LLM finds in a generated answer; empty if there is none."""
    text = text.lstrip()
    for pattern in _MINDSPEED:
        if found := pattern.match(text):
            return found["answer"]
    return ""
