"""The GPUs whose times are estimated: peak rates, which share of them a long launch reaches, and where each is from."""

from __future__ import annotations

import dataclasses

from vitkernels.emulator.devices import GPUS, RATES, Rates

BENCHES = "github.com/RRZE-HPC/gpu-benches, February 2025"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A GPU.

    Attributes:
        arch: The architecture whose configurations and counts are taken; it can be emulated.
        num_sms: Streaming multiprocessors.
        rates: Peak rates.
        reach: Factor of a rate that a long launch reaches, by term; 1 for the others. What a first run on the GPU
            measures goes here.
        sources: Where rates and factors are from, by term.
    """

    arch: str
    num_sms: int
    rates: Rates
    reach: dict[str, float]
    sources: dict[str, str]


# Through PyTorch an H200 reaches 790 TFLOP/s (a product of 8192³ in bf16 on random data) and 4.3 TB/s (a copy on the
# device, bytes read and written).
_H200 = {"tensor": 790 / 989.4, "dram": 4.3 / 4.8}
_HOPPER = {
    "tensor": "989 TFLOP/s, the H100's whitepaper, × 0.80, which an H200 reaches in a product of 8192³ through PyTorch",
    "L2": f"9.77 TB/s, measured on an H200: gpu-l2-cache of {BENCHES}",
}
_COPY = "× 0.90, which an H200 reaches in a copy through PyTorch"

CHIPS = {
    "A100": Chip(
        "sm_80",
        GPUS["sm_80"].num_sms,
        RATES["sm_80"],
        {"tensor": _H200["tensor"], "l2": 5427 / (5120 * 1.41), "dram": 1.737 / 2.039},
        {
            "tensor": "312 TFLOP/s, its whitepaper, × 0.80 as on an H200",
            "L2": f"5.43 TB/s, measured: gpu-l2-cache of {BENCHES}",
            "DRAM": f"2.04 TB/s, its data sheet, × 0.85, measured: gpu-stream's scale of {BENCHES}",
        },
    ),
    "H100": Chip(
        "sm_90",
        GPUS["sm_90"].num_sms,
        RATES["sm_90"],
        _H200,
        _HOPPER | {"DRAM": f"3.35 TB/s, its whitepaper, {_COPY}"},
    ),
    "H200": Chip(
        "sm_90",
        GPUS["sm_90"].num_sms,
        dataclasses.replace(RATES["sm_90"], dram=4.8),
        _H200,
        _HOPPER | {"DRAM": f"4.8 TB/s, its data sheet, {_COPY}"},
    ),
    # The clock: 75 TFLOP/s in fp32 and 37 in fp64 give 1.98 and 1.95 GHz. mma.sync: the H100's FLOPs a multiprocessor
    # and clock. L2: the H100's bytes a multiprocessor and clock. Both are assumed, as is that code of sm_90 gets
    # tcgen05's rate where it uses wgmma.
    "B200": Chip(
        "sm_90",
        GPUS["sm_100"].num_sms,
        Rates(
            clock=1.965, tensor={"f16": 2250, "bf16": 2250, "tf32": 1125, "f64": 37}, mma_sync=0.31, fma=128, alu=64,
            mufu=16, shared=128, l2=5530, dram=8.0,
        ),
        _H200,
        {
            "tensor": "2250 TFLOP/s, NVIDIA's data sheet of the HGX B200, × 0.80 as on an H200",
            "L2": "10.9 TB/s, assumed: an H200's bytes a multiprocessor and clock",
            "DRAM": "8 TB/s, that data sheet, × 0.90 as on an H200",
        },
    ),
}  # fmt: skip
