"""Frozen weights in 4 bits (--qlora), restored for each product in forward and backward, and never kept.

A quantized parameter holds the codes (uint8) and, in its attribute `nf4`, the data that restore it. Codes belong to
rows of the Hugging Face weights, so they are equal in every layout: blocks of 64 lie within a row of a rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from qwen3_npu.kernels import nf4

_AT_ONCE = 1 << 23  # weights of a matrix that are restored at the same time


class Scales:
    """The scales of the blocks of a matrix [rows, columns] (experts are stacked), in float32.

    They are no buffers of a module, since buffers are cast with the module.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.values = torch.empty(rows, columns // nf4.BLOCK, device=device)

    def of(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Of some rows, flat."""
        return self.values[rows].flatten()

    def part(self, rows: slice) -> Scales:
        """The same of some rows."""
        found = copy.copy(self)
        found.values = self.values[rows]
        return found

    def fill(self, values: torch.Tensor, places: Sequence[ScalesOfTensor]) -> None:
        """Store the scales of the matrix, flat."""
        self.values.copy_(values.view_as(self.values))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


class ScalesOfTensor(NamedTuple):
    """The scales of a complete Hugging Face tensor, and the rows of the matrix that they belong to.

    Attributes:
        values: [rows, blocks of a row] float32.
        parts: (rows of the matrix, rows of the tensor, first block of these rows).
    """

    values: torch.Tensor
    parts: list[tuple[slice, slice, int]]


class DoubleScales:
    """The same in 8 bits (--qlora-double-quant), quantized per complete Hugging Face tensor.

    A group of 256 scales may lie in several rows, and on several ranks: each row knows the number of its first block,
    counted from the first group of its tensor.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.codes = torch.empty(rows, columns // nf4.BLOCK, dtype=torch.uint8, device=device)
        self.first = torch.zeros(rows, dtype=torch.int32, device=device)
        self.tops = self.means = torch.empty(0, device=device)

    def of(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Of some rows, flat."""
        codes, device = self.codes[rows].int(), self.codes.device
        block = torch.arange(codes.shape[-1], dtype=torch.int32, device=device)
        group = ((self.first[rows].unsqueeze(-1) + block) // nf4.SCALES_PER_GROUP).flatten()
        values = nf4.dynamic_values(device).index_select(0, codes.flatten())
        return values * self.tops.index_select(0, group) + self.means.index_select(0, group)

    def part(self, rows: slice) -> DoubleScales:
        """The same of some rows."""
        found = copy.copy(self)
        found.codes, found.first = self.codes[rows], self.first[rows]
        return found

    def fill(self, values: torch.Tensor, places: Sequence[ScalesOfTensor]) -> None:
        """Quantize the scales of the tensors that make up the matrix."""
        width, groups, tops, means = self.codes.shape[1], 0, [], []
        for tensor in places:
            codes, top, mean = nf4.quantize_scales(tensor.values.flatten())
            codes = codes.view_as(tensor.values)
            numbers = torch.arange(codes.numel(), dtype=torch.int32).view_as(codes) + groups * nf4.SCALES_PER_GROUP
            for mine, rows, column in tensor.parts:
                self.codes[mine] = codes[rows, column : column + width].to(self.codes.device)
                self.first[mine] = numbers[rows, column].to(self.codes.device)
            tops.append(top)
            means.append(mean.expand_as(top))
            groups += len(top)
        self.tops, self.means = (torch.cat(parts).to(self.codes.device) for parts in (tops, means))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.codes, self.first, self.tops, self.means))


class Nf4Weight:
    """The data that restore a quantized parameter.

    Attributes:
        shape, dtype: of the restored weight.
        scales: of its blocks.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, scales: Scales | DoubleScales) -> None:
        self.shape, self.dtype, self.scales = shape, dtype, scales


def quantized(weight: torch.nn.Parameter, shape: tuple[int, ...], *, is_double: bool = False) -> torch.nn.Parameter:
    """A parameter for codes, uninitialized, in place of a weight; it keeps the weight's marks.

    Args:
        shape: of the restored weight.
        is_double: scales are quantized, too.
    """
    codes = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    found = torch.nn.Parameter(codes, requires_grad=False)
    vars(found).update(vars(weight))
    kind = DoubleScales if is_double else Scales
    scales = kind(weight.numel() // shape[-1], shape[-1], weight.device)
    vars(found)["nf4"] = Nf4Weight(shape, weight.dtype, scales)
    return found


def held(parameter: torch.Tensor) -> Nf4Weight | None:
    """The data that restore a quantized parameter; None for a plain parameter."""
    return getattr(parameter, "nf4", None)


def fill(
    parameter: torch.Tensor, weight: torch.Tensor, places: Callable[[torch.Tensor], Sequence[ScalesOfTensor]]
) -> torch.Tensor:
    """Quantize a weight of the restored shape on its device (on the host while a checkpoint is read).

    Args:
        places: with double quantization: called with the weight's scales, returns the scales of complete tensors.

    Returns:
        the scales, float32.
    """
    kind = held(parameter)
    assert kind is not None
    assert tuple(weight.shape) == kind.shape
    codes, scales = nf4.quantize(weight)
    parameter.data.copy_(codes)
    kind.scales.fill(scales, places(scales) if isinstance(kind.scales, DoubleScales) else ())
    return scales


def restored(parameter: torch.Tensor) -> torch.Tensor:
    """The weight: a quantized one is restored, a plain one is returned as it is."""
    kind = held(parameter)
    return (
        parameter
        if kind is None
        else nf4.dequantize(parameter, kind.scales.of(slice(None)), kind.dtype).view(kind.shape)
    )


def restored_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of the weight."""
    kind = held(parameter)
    return tuple(parameter.shape) if kind is None else kind.shape


def some_of(parameter: torch.Tensor, some: slice) -> torch.Tensor:
    """A part of a quantized weight along its first dimension, in the same memory."""
    kind = held(parameter)
    assert kind is not None
    count, each = kind.shape[0], math.prod(kind.shape[1:-1])
    part = parameter.detach().view(count, -1)[some].flatten()
    shape = some.stop - some.start, *kind.shape[1:]
    scales = kind.scales.part(slice(some.start * each, some.stop * each))
    vars(part)["nf4"] = Nf4Weight(shape, kind.dtype, scales)
    return part


def _blocks(parameter: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows of a quantized matrix, restored one block at a time."""
    kind = held(parameter)
    assert kind is not None
    rows, columns = kind.shape
    size = max(1, _AT_ONCE // columns)
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        codes = parameter[start * columns // 2 : stop * columns // 2]
        scales = kind.scales.of(slice(start, stop))
        # The caller has the only reference.
        yield slice(start, stop), nf4.dequantize(codes, scales, kind.dtype).view(stop - start, columns)


def looked_up(tokens: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Rows of a quantized embedding, [..., hidden]; no other row is restored."""
    kind = held(parameter)
    assert kind is not None
    rows, columns = kind.shape
    codes, scales = parameter.view(rows, -1)[tokens].flatten(), kind.scales.of(tokens)
    return nf4.dequantize(codes, scales, kind.dtype).view(*tokens.shape, columns)


class _Product(torch.autograd.Function):
    """x W^T with a quantized W. Neither forward nor backward keeps W; a large W is restored in blocks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
        ctx.weight = weight
        out = x.new_empty(*x.shape[:-1], restored_shape(weight)[0])
        for rows, part in _blocks(weight):
            out[..., rows] = torch.nn.functional.linear(x, part)
            del part  # free it before the next is restored
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total: torch.Tensor | None = None
        for rows, part in _blocks(ctx.weight):
            product = grad[..., rows] @ part
            del part  # free it before the next is restored
            # Blocks are summed in float32, as inside one product.
            total = product if total is None else total.float() + product
        assert total is not None
        return total.to(grad.dtype), None


class _GroupedProduct(torch.autograd.Function):
    """Rows of x times the matrix of their group, of a quantized weight [groups, out, in]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.nn.Parameter, product: Callable) -> torch.Tensor:
        ctx.weight, ctx.product = weight, product
        return product(x, restored(weight).transpose(1, 2).contiguous())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.product(grad.contiguous(), restored(ctx.weight)), None, None


def grouped_product(x: torch.Tensor, weight: torch.nn.Parameter, product: Callable) -> torch.Tensor:
    """`kernels.grouped_matmul`'s product with a quantized weight [groups, out, in]: [rows, in] -> [rows, out]."""
    return _GroupedProduct.apply(x, weight, product)


class Nf4ColumnParallelLinear(ColumnParallelLinear):
    """megatron's, frozen and quantized; its weight is [out / TP, in]."""

    def __init__(self, *sizes: object, is_double: bool = False, **options: object) -> None:
        super().__init__(*sizes, **options)
        hold_codes(self, is_double=is_double)

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, in] ([s / TP, b, in] under sequence parallelism) -> [s, b, out / TP], and a bias to be added.

        Args:
            weight: quantized, in place of its own (a tied embedding).
        """
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        elif not self.disable_grad_reduce:  # the chunked loss gathers, and sums gradients, itself
            input_ = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        return _with_bias(self, _Product.apply(input_, self.weight if weight is None else weight))


class Nf4RowParallelLinear(RowParallelLinear):
    """megatron's, frozen and quantized; its weight is [out, in / TP]."""

    def __init__(self, *sizes: object, is_double: bool = False, **options: object) -> None:
        super().__init__(*sizes, **options)
        hold_codes(self, is_double=is_double)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, in / TP] -> [s, b, out] ([s / TP, b, out] under sequence parallelism), and a bias to be added."""
        region = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        return _with_bias(self, region(_Product.apply(input_, self.weight), group=self.tp_group))


def hold_codes(linear: torch.nn.Module, *, is_double: bool) -> None:
    """Quantize immediately, so that only one weight at a time is in full precision while a model is built."""
    weight = linear.weight
    assert isinstance(weight, torch.nn.Parameter)
    linear.weight = quantized(weight, tuple(weight.shape), is_double=is_double)


def _with_bias(
    linear: ColumnParallelLinear | RowParallelLinear, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if linear.skip_bias_add:
        return out, linear.bias
    return (out if linear.bias is None else out + linear.bias), None


NF4_LINEARS = {ColumnParallelLinear: Nf4ColumnParallelLinear, RowParallelLinear: Nf4RowParallelLinear}
