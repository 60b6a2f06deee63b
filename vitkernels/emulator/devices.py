"""NVIDIA's GPUs, and those of them that are emulated. No Triton and no engine is imported here."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU, as launch configurations and Triton's JIT see it.

    Attributes:
        arch: ``sm_90`` and the like.
        name: The product's.
        capability: Compute capability, without the point.
        num_sms: Streaming multiprocessors.
        shared_memory: Bytes of shared memory that one program may use.
    """

    arch: str
    name: str
    capability: int
    num_sms: int
    shared_memory: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
GPUS = {
    device.arch: device
    for device in (
        Device("sm_80", "A100", 80, 108, 163 << 10),
        Device("sm_90", "H100", 90, 132, 227 << 10),
        Device("sm_100", "B200", 100, 148, 227 << 10),
        Device("sm_120", "RTX 5090", 120, 170, 99 << 10),
    )
}
DEVICES = {arch: GPUS[arch] for arch in ("sm_80", "sm_90", "sm_120")}  # the engine knows no tcgen05
