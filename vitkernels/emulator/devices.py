"""NVIDIA's GPUs, those of them that are emulated, and their rates. No Triton and no engine is imported here."""

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


@dataclasses.dataclass(frozen=True)
class Rates:
    """How much a GPU does at most.

    Attributes:
        clock: Highest clock of its specification, GHz.
        tensor: TFLOP/s of dense products with sums in fp32 (fp64 for fp64), by the operands' type.
        mma_sync: What share of that ``mma.sync`` reaches; the rest takes ``wgmma``.
        fma, alu, mufu: Lanes a clock and multiprocessor: 32-bit multiply-adds, 32-bit integer and bit operations,
            special functions.
        shared: Bytes of shared memory a clock and multiprocessor.
        l2: Bytes a clock between L2 and all multiprocessors; None where no figure is known.
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


WARPS_ISSUED = 4  # a clock and multiprocessor, of compute capability 7.0 and later

# Clocks, products and DRAM: NVIDIA's whitepapers on the A100 (the SXM of 80 GB), the H100 (SXM5) and the RTX Blackwell
# GPUs. Lanes: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"; the whitepaper for sm_120's
# integers. Shared memory: 32 banks of 4 bytes. L2: the A100's whitepaper; the H100's tells none, and its L2 is taken
# to be as wide. mma.sync on Hopper: arXiv 2402.13499, measured.
RATES = {
    "sm_80": Rates(
        clock=1.41, tensor={"f16": 312, "bf16": 312, "tf32": 156, "f64": 19.5}, mma_sync=1, fma=64, alu=64, mufu=16,
        shared=128, l2=5120, dram=2.039,
    ),
    "sm_90": Rates(
        clock=1.98, tensor={"f16": 989.4, "bf16": 989.4, "tf32": 494.7, "f64": 66.9}, mma_sync=0.62, fma=128, alu=64,
        mufu=16, shared=128, l2=5120, dram=3.35,
    ),
    "sm_120": Rates(
        clock=2.407, tensor={"f16": 209.5, "bf16": 209.5, "tf32": 104.8}, mma_sync=1, fma=128, alu=128, mufu=16,
        shared=128, l2=None, dram=1.792,
    ),
}  # fmt: skip
