"""Flags that say how model and data are sharded across devices."""

from __future__ import annotations

import dataclasses

from qwen3_npu.cli import flag
from qwen3_npu.distributed.layout import Layout, plan
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.numbers import number_list


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelArgs:
    """how the model is sharded across devices"""

    tensor_model_parallel_size: int = flag(1, minimum=1, unit="devices", help="devices that share one layer (TP)")
    pipeline_model_parallel_size: int = flag(1, minimum=1, unit="stages", help="pipeline stages (PP)")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, minimum=1, unit="layers", help="layers of one model chunk of an interleaved pipeline (VPP)"
    )
    num_layer_list: str | None = flag(None, metavar="N,N,..", help="layers of each pipeline stage, if uneven")
    noop_layers: str | None = flag(None, metavar="N,N,..", help="no-op layers of the pipeline, e.g. 94,95")
    expert_model_parallel_size: int = flag(1, minimum=1, unit="devices", help="devices that share the experts (EP)")
    expert_tensor_parallel_size: int | None = flag(
        None, minimum=1, unit="devices", help="devices that share one expert (ETP); default: as TP"
    )
    context_parallel_size: int = flag(1, minimum=1, unit="devices", help="devices that share one sequence (CP)")
    context_parallel_algo: str = flag(
        "ulysses_cp_algo",
        choices=["ulysses_cp_algo", "megatron_cp_algo"],
        help="ulysses: exchange sequence for heads; megatron: pass keys and values around a ring",
    )
    sequence_parallel: bool = flag(False, help="shard the tokens of activations outside attention and MLP over TP")

    p2p_communication: str = flag(
        "auto",
        choices=["auto", "batched", "pairs"],
        help="how pipeline stages exchange: batched calls in the stages' common communicator, or single calls, each "
        "pair of neighbours with a communicator of its own; auto: batched, pairs with virtual stages",
    )

    def __post_init__(self) -> None:
        if self.p2p_communication == "batched" and self.num_layers_per_virtual_pipeline_stage:
            raise UsageError(
                "--p2p-communication batched: neighbours of an interleaved pipeline confuse batched exchanges; use auto"
            )
        if self.num_layers_per_virtual_pipeline_stage and self.pipeline_model_parallel_size == 1:
            raise UsageError("--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size above 1")

    @property
    def batches_p2p(self) -> bool:
        """Whether neighbouring stages exchange in batched calls.

        The default on every device. Single calls (MindSpeed's choice on NPUs) make a communicator for each pair, at
        first use and in the order in which the stages come to it: they have hung (Megatron-LM PR 5240 on NCCL), and
        batching has mended a hang of two stages on NPUs (SGLang PR 38249). An interleaved pipeline needs them, for
        batched exchanges of two stages are confused there (wrong losses, exit 0); `distributed.pipeline` makes their
        communicators before the first step.
        """
        return self.p2p_communication != "pairs" and self.num_layers_per_virtual_pipeline_stage is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverlapArgs:
    """what hides communication"""

    tp_comm_overlap: bool = flag(
        False,
        help="hide it behind products: torch_npu's fused operations on an NPU, elsewhere pieces (--coc-parallel-num)",
    )
    use_ascend_mc2: bool = flag(False, names=("--use-mc2",), help="the same; MindSpeed's name for it")
    use_ascend_coc: bool = flag(
        False, help="hide it behind products in pieces, on every device, also without --sequence-parallel"
    )
    coc_parallel_num: int = flag(
        4,
        choices=[1, 2, 4, 8],
        unit="pieces",
        help="while one is multiplied, the next one travels; 1: nothing is hidden",
    )
    moe_fb_overlap: bool = flag(
        False,
        help="while tokens of a backward pass are on their way to experts or back, the forward pass of another "
        "micro-batch is computed, and the other way round; one more micro-batch is in memory",
    )
    coc_mode: int = flag(-1, choices=[-1, 0, 1, 2], help="-1, 2: --use-ascend-coc works; 0, 1: it changes nothing")

    def __post_init__(self) -> None:
        if self.is_fused and self.use_ascend_coc:
            given = "--use-ascend-mc2" if self.use_ascend_mc2 else "--tp-comm-overlap"
            raise UsageError(f"{given} and --use-ascend-coc are two ways to do the same; drop one of them")

    @property
    def is_fused(self) -> bool:
        """Whether the device's fused operations are used, if it has them."""
        return self.use_ascend_mc2 or self.tp_comm_overlap

    @property
    def asked(self) -> str | None:
        """The flag that switches it on; None if communication is not hidden."""
        if self.is_fused:
            return "--use-ascend-mc2" if self.use_ascend_mc2 else "--tp-comm-overlap"
        is_on = self.use_ascend_coc and self.coc_mode in (-1, 2) and self.coc_parallel_num > 1
        return "--use-ascend-coc" if is_on else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeArgs:
    """where it runs"""

    device: str = flag("auto", choices=["auto", "npu", "cuda", "cpu"], help="kind of device")
    kernels: str = flag(
        "auto",
        choices=["auto", "reference", "torch", "cuda", "npu", "mindspeed"],
        help="implementation of the hot operations; auto: torch_npu's on an NPU, Triton's on a GPU, else torch's own",
    )
    kernel_overrides: list[str] = flag(
        [],
        metavar="OPERATION=IMPLEMENTATION",
        help="other implementation of single operations, e.g. attention=reference",
    )
    seed: int = flag(1234, minimum=0, maximum=2**32 - 1, help="random seed of weights, dropout and data order")
    deterministic: bool = flag(
        False,
        names=("--npu-deterministic", "--use-deter-comp"),
        help="only operations whose results are equal bit for bit in every run",
    )
    dry_run: bool = flag(False, help="check flags, model, layout and data, print what would be done, and stop")
    distributed_timeout_minutes: float = flag(
        10, minimum=0.1, maximum=525600, unit="min", help="timeout of a collective"
    )


def make_layout(
    arch: Qwen3Arch, parallel: ParallelArgs, vocab_divisible_by: int = 1, padded_vocab_size: int | None = None
) -> Layout:
    """The layout that the parallel flags describe.

    Raises:
        UsageError: it does not fit this architecture.
    """
    return plan(
        arch,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        expert=parallel.expert_model_parallel_size,
        expert_tensor=parallel.expert_tensor_parallel_size,
        layers_per_virtual_stage=parallel.num_layers_per_virtual_pipeline_stage,
        num_layer_list=number_list(parallel.num_layer_list) or None,
        noop_layers=number_list(parallel.noop_layers),
        vocab_divisible_by=vocab_divisible_by,
        padded_vocab_size=padded_vocab_size,
    )
