"""An NPU that is not there: the real torch_npu over a stub CANN, with kernels computed on the host.

Real: operation schemas, devices, allocator, autograd nodes, argument checks of the host code, transfer_to_npu.
Emulated: what runs on the device (by the documented mathematics), HCCL (by gloo), copies on side streams (late).
Cannot be seen here: numerics and speed of the real kernels, their memory, HCCL itself.
"""

from __future__ import annotations


def install() -> None:
    """Take over the kernels of this process; torch_npu's redirect of torch.cuda is up to the caller."""
    from sim import aicpu, device, hccl, operations

    aicpu.install()
    device.install()
    operations.install()
    hccl.install()
