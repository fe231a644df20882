"""The constants of each device: one table, each published constant with its source.

`benchmarks/planning/fit_devices.py` fits efficiencies and overheads; errors are those of runs outside the fit.
Hopper GPUs: 19 published runs, median error 11 %. Ascend devices: 20 cases of MindSpeed-LLM's CI (one node, few
layers), median error 15 %. The constants of A100 are guesses. `learn` replaces all of them by those of your own runs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from qwen3_npu import schema
from qwen3_npu.errors import UsageError, did_you_mean
from qwen3_npu.files import write_text

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device of a cluster.

    Attributes:
        memory: bytes that a program can use, as torch reports them; on NPUs less than the device's name says, since
            firmware uses a part.
        flops: dense 16-bit products, FLOP/s, as published.
        memory_bandwidth: bytes/s.
        node: devices of a node.
        linked: devices that `link` connects, if these are more than a node's.
        link, network: bytes/s that one device sends to a device that `link` connects, and to another one.
        pair: bytes/s between two devices of a node whose pairs have links of their own; 0: a switch gives them `link`.
        host_link: bytes/s between device and host, each way; 25 GB/s is PCIe 4.0 x16 alone.
        latency, network_latency: seconds of a collective's step.
        product: share of `flops` that large products reach.
        product_half: FLOP of a product at which half of that share is reached.
        attention: share of `flops` that attention reaches.
        streaming: share of `memory_bandwidth` that element-wise operations reach.
        transfer: share of `link` and `network` that collectives reach.
        fused: efficiency of operations that multiply and communicate at once; a guess.
        launch: seconds of host time per operation.
        stall: seconds that a MoE layer loses in each pass while the host waits for the sizes of the exchange.
        storage: bytes/s that a node reads from, or writes to, the file system of the cluster. Llama 3's gave 2 TB/s for
            long, and 7 at most, to 16,384 GPUs: 1.0 and 3.4 GB/s a node of 8 (arXiv:2407.21783, 3.3.1).
        group: seconds to make a communicator. MegaScale's 2,048 GPUs made theirs in 5 s (arXiv:2402.15627, 3.5), which
            is this for each of the 19 groups that a rank of this project has.
        reserve: bytes of the runtime (context, collectives' buffers).
        kernels: this project's kernels on this device, by the names of `activations.layer_bytes`.
        error: relative uncertainty of a predicted step time, a guess until `--learn`.
        sources: sources of the published numbers.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    node: int
    link: float
    network: float
    pair: float = 0.0
    linked: int = 0
    host_link: float = 25e9
    latency: float = 10e-6
    network_latency: float = 20e-6
    product: float = 0.75
    product_half: float = 4e9
    attention: float = 0.5
    streaming: float = 0.75
    transfer: float = 0.75
    fused: float = 0.9
    launch: float = 8e-6
    stall: float = 0.0
    storage: float = 1e9
    group: float = 0.26
    reserve: float = 1.5 * GIB
    kernels: str = "torch"
    error: float = 0.25
    sources: str = ""

    @property
    def domain(self) -> int:
        """Devices that `link` connects."""
        return max(self.node, self.linked)

    def bandwidth(self, size: int, inside: bool) -> float:
        """Bytes/s that a device sends to a group of `size`, which is inside of the domain or goes over the network."""
        if not inside:
            return self.network
        return min(self.link, (size - 1) * self.pair) if self.pair else self.link


def _ascend(
    name: str,
    memory: float,
    flops: float,
    bandwidth: float,
    *,
    node: int,
    pair: float = 28e9,
    linked: int = 0,
    sources: str,
) -> Device:
    """Published figures, and constants that benchmarks/planning/fit_devices.py printed."""
    return Device(
        name=name,
        memory=memory * GIB,
        flops=flops,
        memory_bandwidth=bandwidth,
        node=node,
        link=196e9,
        pair=pair,
        linked=linked,
        network=25e9,
        product=0.85,
        product_half=2.57e9,
        attention=0.343,
        streaming=0.467,
        transfer=0.692,
        launch=155e-6,
        stall=0.87e-3,
        host_link=13.6e9,
        reserve=2.5 * GIB,
        kernels="npu",
        sources=sources,
    )


_A2 = "354 TFLOP/s (see platform/npu.py), 64 GB HBM2e at 1.6 TB/s, 8 a node, 7 HCCS links of 28 GB/s a direction, "
_A2 += "200 Gb/s RoCE each (Ascend 910B1/B2, Atlas 800T A2); 60.96 GiB in messages of torch_npu (ms-swift#9403)"
_B4 = "280 TFLOP/s, 32 GB at 0.8 TB/s (Ascend 910B4, Atlas 800I A2); 29.50 GiB by torch_npu (LlamaFactory#4277)"
_A3 = "one of two dies: 376 TFLOP/s, 64 GB at 1.6 TB/s, 196 GB/s, 200 Gb/s RDMA (Ascend 910C, arXiv:2506.12708); "
_A3 += "61.27 GiB by torch_npu (sglang#29838); "
_POD = "nodes of a SuperPoD of 384 x 2 dies reach each other as a node's devices do, SuperPoDs by RoCE "
_POD += (
    "(hiascend.com, MindCluster 7.3.0, Atlas 900 A3 SuperPoD; arXiv:2506.12708: less than 3 % slower than in a node)"
)
_REPORTED = "; memory as torch reports it"


def _hopper(name: str, memory: float, bandwidth: float, *, link: float, sources: str) -> Device:
    """Published figures, and constants that benchmarks/planning/fit_devices.py printed."""
    return Device(
        name=name,
        memory=memory * GIB,
        flops=989e12,
        memory_bandwidth=bandwidth,
        node=8,
        link=link,
        network=50e9,
        product=0.714,
        product_half=16.3e9,
        attention=0.669,
        streaming=0.9,
        transfer=0.95,
        stall=1.96e-3,
        error=0.2,
        sources=sources + _REPORTED,
    )


DEVICE_SPECS = {
    device.name: device
    for device in (
        _ascend("910B-64G", 60.96, 354e12, 1.6e12, node=8, sources=_A2),
        _ascend("910B-32G", 29.5, 280e12, 0.8e12, node=8, sources=_B4),
        _ascend("910C-64G", 61.27, 376e12, 1.6e12, node=16, pair=0.0, linked=768, sources=_A3 + _POD),
        _ascend("910C-64G-RoCE", 61.27, 376e12, 1.6e12, node=16, pair=0.0, sources=_A3 + "no SuperPoD"),
        Device(
            name="A100-80G",
            memory=79.1 * GIB,
            flops=312e12,
            memory_bandwidth=2.0e12,
            node=8,
            link=300e9,
            network=25e9,
            sources="NVIDIA A100 data sheet; HDR InfiniBand" + _REPORTED,
        ),
        _hopper("H100-80G", 79.1, 3.35e12, link=450e9, sources="NVIDIA H100 SXM data sheet; NDR InfiniBand"),
        _hopper("H800-80G", 79.1, 3.35e12, link=200e9, sources="NVIDIA H800: as H100 with 400 GB/s NVLink"),
        _hopper("H200-141G", 139.8, 4.8e12, link=450e9, sources="NVIDIA H200 data sheet; NDR InfiniBand"),
    )
}
_LEARNT = {field.name for field in dataclasses.fields(Device)} - {"name", "node", "linked", "kernels", "sources"}


def find_device(name: str, learnt: str | None = None, flag: str = "--device") -> Device:
    """A device of the table, with the constants learned on this cluster.

    Args:
        learnt: file that `plan --learn` wrote.
        flag: the flag of the name.

    Raises:
        UsageError: unknown name (the known ones are listed), or a file that is no such table.
    """
    by_name = {known.lower(): device for known, device in DEVICE_SPECS.items()}
    if name.lower() not in by_name:
        raise UsageError(
            f"{flag} {name} is not known{did_you_mean(name, DEVICE_SPECS)}; known: {', '.join(DEVICE_SPECS)}"
        )
    device = by_name[name.lower()]
    if learnt is None:
        return device
    try:
        values: dict[str, Any] = dataclasses.asdict(device) | read_learnt(Path(learnt))
    except UsageError as error:
        raise UsageError(f"--device-table: {error}") from None
    return Device(**values)


def read_learnt(path: Path) -> dict[str, float]:
    """The constants in a file of `plan --learn`. Raises: UsageError: it cannot be read or has other content."""
    constants = schema.read_record(path).record("constants")
    constants.only(_LEARNT)
    return {name: constants.number(name, least=0, most=1e18) for name in constants.fields}


def learn(folder: Path, output: Path) -> list[str]:
    """Make this cluster's table of a training's own figures (`--learn RUN_DIR`); log lines about the result.

    A run's metrics.jsonl has a line `plan` (prediction and device) and the measured steps. The ratio of compute times
    scales the shares of products and attention; memory beyond the plan is added to the reserve.

    Raises:
        UsageError: no such run, or it was not planned.
    """
    path = folder / "metrics.jsonl"
    lines = schema.read_small(path).splitlines()
    plans = [row for row in (_row(line, path) for line in lines) if "planned_step_seconds" in row.fields]
    if not plans:
        raise UsageError(f"--learn {folder}: {path} has no planned step; the training must have logged three steps")
    last = plans[-1]
    device = find_device(last.text("device"))
    planned, measured = (last.number(f"{kind}_step_seconds", least=1e-9) for kind in ("planned", "measured"))
    ratio = measured / planned
    extra = last.number("measured_bytes", least=0) - last.number("planned_bytes", least=0)
    constants = {
        "product": min(0.98, device.product / ratio),
        "attention": min(0.98, device.attention / ratio),
        "streaming": min(0.98, device.streaming / ratio),
        "reserve": max(1.0, device.reserve + extra),
        "error": 0.1,
    }
    record = {"device": device.name, "learnt_from": last.text("layout", ""), "constants": constants}
    write_text(output, json.dumps(record, indent=2) + "\n")
    return [
        f"step: planned {planned:.2f} s, measured {measured:.2f} s",
        f"written: {output}; give it as --device-table {output}",
    ]


def _row(line: bytes, path: Path) -> schema.Record:
    return schema.record(schema.parse_json(line, str(path)), str(path))
