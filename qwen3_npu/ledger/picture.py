"""A stacked picture of times over steps, as PNG: numpy and zlib, no plotting library. No torch."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

# Kind -> name for people, red, green, blue.
COLOURS = (
    ("blue", 57, 106, 177),
    ("orange", 218, 124, 48),
    ("green", 62, 150, 81),
    ("red", 204, 37, 41),
    ("grey", 83, 81, 84),
    ("purple", 107, 76, 154),
    ("brown", 146, 36, 40),
    ("olive", 148, 139, 61),
    ("cyan", 70, 190, 210),
    ("pink", 230, 130, 190),
)
_HEIGHT, _WIDTH = 360, 960


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of a picture, uint8 [height, width, 3]. The format is that of the PNG specification, 2nd edition."""
    height, width, _ = pixels.shape
    rows = np.concatenate((np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)), axis=1)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows.tobytes()))
        + chunk(b"IEND", b"")
    )


def stacked_columns(columns: Sequence[Mapping[str, float]], kinds: Sequence[str]) -> np.ndarray:
    """A column for each record, with the kinds stacked from below; uint8 [height, width, 3].

    Args:
        kinds: in this order, in the colours of `COLOURS`.
    """
    highest = max(sum(column.get(kind, 0.0) for kind in kinds) for column in columns)
    picture = np.full((_HEIGHT, _WIDTH, 3), 255, np.uint8)
    for number, column in enumerate(columns):
        left, right = (number * _WIDTH // len(columns), (number + 1) * _WIDTH // len(columns))
        tops = np.cumsum([column.get(kind, 0.0) for kind in kinds]) / max(highest, 1e-12) * _HEIGHT
        low = 0
        for top, (_, *colour) in zip(tops.round().astype(int).tolist(), COLOURS * 3, strict=False):
            picture[_HEIGHT - top : _HEIGHT - low, left : max(right, left + 1)] = colour
            low = top
    return picture


def heat(values: Sequence[float]) -> np.ndarray:
    """A line of squares, white at the median and red from 1.5 times it; uint8 [16, 16 ranks, 3]."""
    array = np.array(values)
    over = np.clip((array / max(float(np.median(array)), 1e-12) - 1) / 0.5, 0, 1)
    line = np.stack((np.full_like(over, 255), 255 * (1 - over), 255 * (1 - over)), axis=1).round().astype(np.uint8)
    return np.repeat(np.repeat(line[None], 16, axis=0), 16, axis=1)
