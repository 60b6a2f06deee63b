"""NVIDIA GPUs, which of them can be emulated, and their peak rates. Imports neither Triton nor the engine."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """The facts about a GPU that launch configurations and Triton's JIT use.

    Attributes:
        arch: ``sm_90`` and the like.
        name: The product's name.
        capability: Compute capability without the point: 90 for 9.0.
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
DEVICES = {arch: GPUS[arch] for arch in ("sm_80", "sm_90", "sm_120")}  # emulated; the engine has no tcgen05


@dataclasses.dataclass(frozen=True)
class Rates:
    """A GPU's peak rates.

    Attributes:
        clock: Highest specified clock, GHz.
        tensor: TFLOP/s of dense products with fp32 accumulation (fp64 for fp64), by the operands' type.
        mma_sync: The share of ``tensor`` that ``mma.sync`` reaches; only ``wgmma`` reaches all of it.
        fma, alu, mufu: Lanes per clock and multiprocessor: 32-bit multiply-adds, 32-bit integer and bit operations,
            special functions.
        shared: Bytes of shared memory per clock and multiprocessor.
        l2: Bytes per clock between L2 and all multiprocessors together; None if unknown.
        dram: TB/s.
    """

    clock: float
    tensor: dict[str, float]
    mma_sync: float
    fma: int
    alu: int
    mufu: int
    shared: int
    l2: int | None
    dram: float


WARPS_ISSUED = 4  # per clock and multiprocessor, from compute capability 7.0 on

# Clocks, products and DRAM: NVIDIA's whitepapers on the A100 (the SXM of 80 GB), the H100 (SXM5) and the RTX Blackwell
# GPUs. Lanes: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"; the whitepaper for sm_120's
# integers. Shared memory: 32 banks of 4 bytes. L2: the A100's whitepaper. The H100's gives no figure: gpu-l2-cache of
# github.com/RRZE-HPC/gpu-benches reads 9.77 TB/s on an H200, which has the same multiprocessors, clock and L2
# (h200.txt of February 2025, 21 MiB); that was reached, so a bound by L2 may be a little too long. mma.sync
# on Hopper: measured in arXiv 2402.13499.
RATES = {
    "sm_80": Rates(
        clock=1.41, tensor={"f16": 312, "bf16": 312, "tf32": 156, "f64": 19.5}, mma_sync=1, fma=64, alu=64, mufu=16,
        shared=128, l2=5120, dram=2.039,
    ),
    "sm_90": Rates(
        clock=1.98, tensor={"e4m3": 1978.9, "f16": 989.4, "bf16": 989.4, "tf32": 494.7, "f64": 66.9}, mma_sync=0.62,
        fma=128, alu=64, mufu=16, shared=128, l2=4934, dram=3.35,
    ),
    "sm_120": Rates(
        clock=2.407, tensor={"e4m3": 419, "f16": 209.5, "bf16": 209.5, "tf32": 104.8}, mma_sync=1, fma=128, alu=128,
        mufu=16, shared=128, l2=None, dram=1.792,
    ),
}  # fmt: skip
