"""The forward pass of one micro-batch between the exchanges of another one's backward pass (--moe-fb-overlap).

megatron-core's schedules have the seam, `overlap_moe_expert_parallel_comm`: from the second one on, each forward pass
is given together with the backward pass of an earlier micro-batch on which it does not depend. What megatron does with
the two asks for its own layers, cut into pieces by hand; here whole passes run by turns (`turns`), which pass where
tokens are on their way to experts or back. So every layer, recomputation, adapter and kernel can be in them.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_type

import qwen3_npu.watch.here as here
from qwen3_npu.distributed.turns import by_turns

_PLAIN = schedules.combined_1f1b_schedule_for_no_pipelining
_VIRTUAL = schedules.combined_1f1b_schedule_for_interleaved_pipelining


def interleave_passes(config: TransformerConfig) -> None:
    """Let megatron's schedules interleave passes of a model with this configuration."""
    config.overlap_moe_expert_parallel_comm = True
    schedules.combined_1f1b_schedule_for_no_pipelining = _without_stages
    schedules.combined_1f1b_schedule_for_interleaved_pipelining = _with_virtual_stages


def _kept(is_second: bool) -> Callable[[], None]:
    """Of each pass: its random numbers, which recomputation sets and sets back in the middle of the other pass."""
    states = random._get_all_rng_states()

    def put_back() -> None:
        here.at("backward" if is_second else "forward")
        random._set_all_rng_states(*states)

    return put_back


def _both(forward: Callable | None, backward: Callable | None) -> tuple[Any, Any]:
    """Results of the passes that there are."""
    if backward is not None:
        here.at("backward")
    if forward is None or backward is None:
        return forward and forward(), backward and backward()
    results = by_turns(forward, backward, _kept)
    here.at("backward")  # or what else megatron's schedule does next
    return results


def _arguments(function: Callable, given: tuple, named: dict[str, Any]) -> types.SimpleNamespace:
    """What megatron gave to one of its own functions, by name."""
    bound = inspect.signature(function).bind(*given, **named)
    bound.apply_defaults()
    return types.SimpleNamespace(**bound.arguments)


def _forward(asked: types.SimpleNamespace, number: int, **which: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """megatron's forward step of a micro-batch: its output and its tokens."""
    result: tuple[torch.Tensor, torch.Tensor] = schedules.forward_step(
        asked.forward_step_func,
        num_microbatches=asked.num_microbatches,
        forward_data_store=asked.forward_data_store,
        config=asked.config,
        cp_group_size=parallel_state.get_context_parallel_world_size(),
        collect_non_loss_data=asked.collect_non_loss_data,
        current_microbatch=number,
        **which,
    )
    return result


def _without_stages(*given: Any, **named: Any) -> tuple[list, torch.Tensor]:
    """Forward 0; forward 1 with backward 0; ...; the last backward, with which gradients are reduced."""
    asked = _arguments(_PLAIN, given, named)
    model, count = asked.model, asked.num_microbatches
    tokens, output = asked.total_num_tokens, None

    def forward(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = asked.check_first_val_step(number == 0)
        source = {"data_iterator": asked.data_iterator, "model": model, "input_tensor": asked.input_tensor}
        return _forward(asked, number, **source, is_first_microbatch=first)

    def backward(output: torch.Tensor) -> None:
        schedules.backward_step(
            asked.input_tensor, output, asked.output_tensor_grad, get_model_type(model), asked.config
        )

    with asked.no_sync_func():
        for number in range(count):
            before = None if output is None else functools.partial(backward, output)
            (output, more), _ = _both(functools.partial(forward, number), before)
            tokens += more
    assert output is not None, "no micro-batch"
    backward(output)
    return asked.forward_data_store, tokens


def _with_virtual_stages(*given: Any, **named: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A forward pass, a backward pass, or both, of chunks of an interleaved pipeline.

    What a stage sends leaves in one order on all stages: first forward.
    """
    asked = _arguments(_VIRTUAL, given, named)
    there, back = asked.f_virtual_microbatch_id, asked.b_virtual_microbatch_id
    forward = backward = None
    if there is not None:
        forward = _virtual_forward(asked, there)
    if back is not None:
        backward = _virtual_backward(asked, back)
    output, gradient = _both(forward, backward)
    if back is not None:
        asked.backward_step_helper_postprocess(back)
        if asked.post_backward is not None:
            gradient = asked.post_backward(gradient)
    return output, gradient


def _virtual_forward(asked: types.SimpleNamespace, there: int) -> Callable[[], torch.Tensor]:
    chunk = asked.get_model_chunk_id(there, forward=True)
    number = asked.get_microbatch_id_in_model_chunk(there, forward=True)
    if asked.pre_forward is not None:
        asked.pre_forward()
    received = asked.forward_step_helper_preprocess(there, chunk, number)

    def forward() -> torch.Tensor:
        here.at("forward")
        output, tokens = _forward(
            asked,
            number,
            data_iterator=asked.data_iterator[chunk],
            model=asked.model[chunk],
            input_tensor=received,
            is_first_microbatch=asked.check_first_val_step(asked.is_first_microbatch_for_model_chunk(there)),
            vp_stage=chunk,
            is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        )
        asked.forward_step_helper_postprocess(chunk, output, tokens)
        sent: torch.Tensor = output if asked.post_forward is None else asked.post_forward(output)
        return sent

    return forward


def _virtual_backward(asked: types.SimpleNamespace, back: int) -> Callable[[], torch.Tensor | None]:
    chunk = asked.get_model_chunk_id(back, forward=False)
    if asked.pre_backward is not None:
        asked.pre_backward()
    taken = asked.backward_step_helper_preprocess(back, chunk)
    return functools.partial(schedules.backward_step, *taken, get_model_type(asked.model[chunk]), asked.config)
