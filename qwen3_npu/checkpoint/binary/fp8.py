"""FP8 weights of Hugging Face checkpoints, dequantized while they are read. No torch.

Format: `quantization_config` of transformers' FineGrainedFP8Config (quant_method "fp8"), as in Qwen3-*-FP8. A matrix is
stored in float8_e4m3fn beside NAME_scale_inv, one number for each block of `weight_block_size` (128 x 128); the last
blocks of a row or column may be smaller. weight = float32(code) * scale, rounded once to the other weights' dtype.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, Region, from_float32, row_blocks, sizes, to_float32
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsFile
from qwen3_npu.errors import UsageError, printable
from qwen3_npu.schema import Record, shown

SCALE = "_scale_inv"  # behind the name of the weight
CODES = "F8_E4M3"


def _e4m3() -> np.ndarray:
    """The values of the 256 codes: 4 exponent bits with bias 7, 3 mantissa bits, no infinity; 0x7F and 0xFF are NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


_VALUES = _e4m3()


def block_sizes(config: Record) -> tuple[int, int]:
    """`weight_block_size` of a config.json.

    Raises:
        UsageError: the weights are quantized in another way.
    """
    found = config.record("quantization_config", Record({}, f"{config.where}: quantization_config"))
    method, block = found.fields.get("quant_method"), found.fields.get("weight_block_size")
    if method != "fp8":
        raise UsageError(f"{found.where}: quant_method {shown(method)}, but the weights are FP8; fp8 is expected")
    if block is None:
        raise UsageError(f"{found.where}: no weight_block_size; FP8 weights are read with one scale per block only")
    rows, *columns = counts = found.counts("weight_block_size")
    if len(columns) != 1 or not all(counts):
        raise UsageError(f"{found.where}: weight_block_size {shown(block)}; two numbers above 0 are expected")
    return rows, columns[0]


@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A matrix in FP8 with its scales.

    Attributes:
        file, scales: files of the codes and of the scales. The name of the scales ends with `SCALE`.
        block: (rows, columns) that share a scale.
        dtype: of the dequantized values.
    """

    name: str
    file: SafetensorsFile
    scales: SafetensorsFile
    block: tuple[int, int]
    dtype: DType

    def __post_init__(self) -> None:
        shape, grid = self.file.shape(self.name), self.scales.shape(self.name + SCALE)
        if self.file.header[self.name].dtype != CODES:
            held = self.file.header[self.name].dtype
            raise UsageError(
                f"{self.file.path}: {printable(self.name)} has scales and dtype {held}; {CODES} is supported"
            )
        self.scales.dtype(self.name + SCALE)  # an error now rather than after hours
        expected = tuple(-(-size // block) for size, block in zip(shape, self.block, strict=False))
        if len(shape) != 2 or grid != expected:
            raise UsageError(
                f"{self.scales.path}: {printable(self.name)}{SCALE} has shape {list(grid)}; {list(expected)} is "
                f"expected of {list(shape)} in blocks of {list(self.block)}"
            )

    def read(self, region: Region) -> np.ndarray:
        """A part of the matrix, dequantized; beside the result a few MB of memory are used."""
        out = np.empty(sizes(region), self.dtype.carrier)
        (top, _), (left, right) = region
        columns = np.arange(left, right) // self.block[1]
        for part in row_blocks(region, 4):
            (start, stop), _ = part
            rows = np.arange(start, stop) // self.block[0]
            grid = (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)
            name = self.name + SCALE
            scales = to_float32(self.scales.read(name, grid), self.scales.dtype(name))
            values = _VALUES[self.file.read_bytes(self.name, part)]
            values *= scales[rows - rows[0]][:, columns - columns[0]]
            out[start - top : stop - top] = from_float32(values, self.dtype)
        return out
