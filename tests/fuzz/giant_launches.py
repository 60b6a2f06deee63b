"""Prints, as JSON, how the launchers launch tensors of more than 2³¹ elements.

The tensors need no memory: launches are traced, as in vitkernels.tools.aot. Those that choose no 32-bit offsets are
compiled for sm_90, as far as the addresses tell: to TTIR.
"""

import json

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

from vitkernels import ops  # noqa: F401  registers the ops
from vitkernels.ops._registry import OPS
from vitkernels.tools.aot import compile_launch, trace
from vitkernels.tools.aot.read import address_bits

BF16 = torch.bfloat16
ALL = [True] * 3


def new(*shape, strides=None, dtype=BF16):
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="cuda")
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


def run(op, *args):
    return OPS[op].launcher(*args)


def layer_norm():
    x, w, statistics = new(1 << 17, 1 << 15), new(1 << 15), new(1 << 17, dtype=torch.float32)
    run("layer_norm_fwd", x, None, w, w, None, None, 1e-6, BF16)
    run("layer_norm_bwd", x, None, x, None, w, None, None, statistics, statistics, 1e-6, BF16,
        [False, True, True, True, False, False, False])  # fmt: skip


def linear(x, features):
    w, b = new(features, x.shape[1]), new(features)
    y, z = run("linear_fwd", x, w, b, None, None, "gelu", BF16, True)
    run("linear_bwd", y, x, w, b, z, None, "gelu", [*ALL, False])


def mlp():
    x, w1, b1, w2 = new(1 << 19, 1024), new(8192, 1024), new(8192), new(1024, 8192)
    y, z, act = run("mlp_fwd", x, w1, b1, w2, None, None, None, "gelu", BF16, True, True)
    run("mlp_bwd", y, x, w1, w2, None, None, z, act, "gelu", [True] * 4 + [False, False])


def gated(x):
    _, z = run("glu_fwd", x, new(8192, x.shape[1]), None, None, None, "silu", False, True)
    run("glu_bwd", new(x.shape[0], 1024), new(1024, 4096), None, z, "silu", False, True, True)


def attention(B, N, H, D, token_stride=None, mask=None):
    strides = None if token_stride is None else (H * D, token_stride, D, 1)
    q, k, v = (new(B, N, H, D, strides=strides) for _ in range(3))
    o, lse = run("attention_fwd", q, k, v, 0.1, False, mask)
    run("attention_bwd", o, q, k, v, o, lse, 0.1, [True, True, False], False, mask)


def prepare(token_stride):
    x, table = new(2, 577, 4, 64, strides=(256, token_stride, 64, 1)), new(1, 1, 577, 64)
    run("attention_prepare_fwd", x, None, None, table, table, "rms", 1e-6, False, 0)


def patch_embed(B):
    images, weight = new(B, 3, 512, 512), new(768, 3, 16, 16)
    tokens = run("patch_embed_fwd", images, weight, None, None, None, True, None, BF16)
    run("patch_embed_bwd", tokens, images, weight, True, True)


def far_mask():
    return new(1, 1, 64, 64, strides=(1 << 33, 1 << 33, 1 << 26, 1))


CASES = {
    "layer_norm": layer_norm,
    "linear": lambda: linear(new(1 << 20, 4096), 4096),
    "linear, rows far apart": lambda: linear(new(300, 64, strides=(1 << 24, 1)), 80),
    "mlp": mlp,
    "swiglu_mlp": lambda: gated(new(1 << 19, 1024)),
    "swiglu_mlp, rows far apart": lambda: gated(new(300, 1024, strides=(1 << 24, 1))),
    "attention, heads beyond 65,535": lambda: attention(70_000, 50, 16, 64),
    "attention by windows, tokens near": lambda: attention(2, 49, 4, 32, 1 << 25),
    "attention by windows, tokens far": lambda: attention(2, 49, 4, 32, 1 << 26),
    "attention by rows, tokens far": lambda: attention(64, 100, 4, 64, 1 << 25),
    "attention by rows, mask far": lambda: attention(64, 64, 4, 64, mask=far_mask()),
    "attention by windows, mask far": lambda: attention(2, 64, 4, 32, mask=far_mask()),
    "attention by blocks, tokens near": lambda: attention(2, 577, 4, 64, 1 << 21),
    "attention by blocks, tokens far": lambda: attention(2, 577, 4, 64, 1 << 22),
    "attention's preparation, near": lambda: prepare(1 << 21),
    "attention's preparation, far": lambda: prepare(1 << 22),
    "patch_embed, near": lambda: patch_embed(32),
    "patch_embed, far": lambda: patch_embed(1 << 13),
}


def nothing(module, metadata) -> bytes:
    metadata |= {"name": "", "shared": 0}
    return b""


def to_ttir(*arguments):
    """Triton's hook: a compilation ends at its first stage, TTIR, or TTGIR of Gluon, which stands for the binary."""
    if arguments:
        _, stages, *_ = arguments
        name = "ttir" if "ttir" in stages else "ttgir"
        first = stages[name]
        stages.clear()
        stages |= {name: first, "cubin": nothing}
    return "to TTIR", "to TTIR"


def main():
    triton.knobs.runtime.add_stages_inspection_hook = to_ttir
    found, case = [], ""
    launch = triton.JITFunction.run

    def record(self, *args, grid, **arguments):
        strides = [abs(v) for n, v in arguments.items() if n.startswith("stride_")]
        found.append(
            {
                "case": case,
                "kernel": self.fn.__name__,
                "grid": list(grid),
                "index": str(arguments["INDEX"]) if "INDEX" in arguments else None,
                "largest_stride": max(strides, default=0),
            }
        )
        return launch(self, *args, grid=grid, **arguments)

    triton.JITFunction.run = record
    # A build of PyTorch without CUDA makes no copies there, not even of what is not there.
    FakeTensor.contiguous = lambda t: t if t.is_contiguous() else torch.empty(t.shape, dtype=t.dtype, device=t.device)
    for name, launcher in CASES.items():
        case, first = name, len(found)
        traced = trace(launcher, "sm_90")
        for row, what in zip(found[first:], traced, strict=True):
            chosen_32 = row["index"] == "int32"
            row["address_bits"] = 32
            if not chosen_32:
                asm = compile_launch(what).asm
                row["address_bits"] = address_bits(asm.get("ttir") or asm["ttgir"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
