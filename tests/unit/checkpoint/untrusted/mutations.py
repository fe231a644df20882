"""Seeded damage to files, as bytes and as JSON: what a fuzzer throws at a reader."""

from __future__ import annotations

import copy
import random
from typing import Any

# Values that a field of another kind, or out of range, may have.
ODD: tuple[Any, ...] = (None, True, False, -1, 0, 1, 2, 3.0, 2.5, 1e400, 2**31, 2**62, 2**63, 2**64, 10**40)
ODD += ("", "x", "F32", "\x1b[2J", [], [1], [-1], [[]], {}, {"x": 1}, [0, 8], [2**63, 2**63], [4, 0])


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three bits flipped, bytes replaced, cut out, put in or moved."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(6)
        if not out or kind == 0:
            out[at:at] = rng.randbytes(rng.choice((1, 8)))
        elif kind == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at : at + rng.randint(1, 9)] = b""
        elif kind == 3:
            out[at] = rng.choice(b'\x00\xff"[]{},:-0123456789.eE')
        elif kind == 4:
            out[at : at + 8] = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data))).to_bytes(8, "little")
        else:
            del out[at:]
    return bytes(out)


def damaged_json(value: Any, rng: random.Random) -> Any:
    """One place of a JSON value replaced, dropped, moved by a little, or copied from another."""
    value = copy.deepcopy(value)
    places = [(parent, key) for parent, key in _places(value)]
    parent, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0 and isinstance(parent, (dict, list)):
        del parent[key]
    elif kind == 1 and isinstance(parent[key], int) and not isinstance(parent[key], bool):
        parent[key] += rng.choice((-8, -4, -1, 1, 2, 4, 8, 64))
    elif kind == 2:
        other, other_key = rng.choice(places)
        parent[key] = copy.deepcopy(other[other_key])
    elif kind == 3 and isinstance(parent, list):
        parent.insert(key, rng.choice(ODD))
    else:
        parent[key] = rng.choice(ODD)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        found += _places(value[key])
    return found
