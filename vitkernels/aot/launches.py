"""The launches of every op's forward and backward at a case's shapes, on fake tensors: what there is to compile."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitkernels import ops  # noqa: F401  registers the ops
from vitkernels.ops._registry import OPS
from vitkernels.ops.swiglu.config import padded
from vitkernels.runtime import wide_dtype
from vitkernels.testing.cases import Case


def launches(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return for each op a function that launches its kernels as a training step of ``case`` does.

    The functions create their tensors on device ``cuda``. Call them through :func:`vitkernels.aot.trace`, which makes
    these tensors fake, so that they need no GPU.
    """
    B, N, C, F, H, D = case.batch, case.tokens, case.channels, case.hidden, case.heads, case.head_dim
    sums = wide_dtype(dtype)

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def run(op: str, *args):
        return OPS[op].launcher(*args)

    def gamma():
        return new(C) if case.layer_scale else None

    rms = case.norm == "rms_norm"

    def norm():
        x, w, b = new(B, N, C), new(C), None if rms else new(C)
        statistics = new(0 if rms else B * N, dtype=sums), new(B * N, dtype=sums)
        run("layer_norm_fwd", x, None, w, b, None, None, 1e-6, dtype, rms)
        run("layer_norm_bwd", x, None, x, None, w, None, None, *statistics, 1e-6, dtype,
            [False, True, True, not rms, False, False, False], rms)  # fmt: skip

    def add_norm():
        x, w, b = new(B, N, C), new(C), None if rms else new(C)
        statistics = new(0 if rms else B * N, dtype=sums), new(B * N, dtype=sums)
        needs_dx = case.layer_scale
        run("layer_norm_fwd", x, x, w, b, gamma(), None, 1e-6, dtype, rms)
        run("layer_norm_bwd", x, x, x, x, w, gamma(), None, *statistics, 1e-6, dtype,
            [needs_dx, True, True, not rms, needs_dx, False, False], rms)  # fmt: skip
        run("layer_norm_bwd", x, x, x, None, w, None, None, *statistics, 1e-6, dtype,
            [False, True, True, not rms, False, True, True], rms)  # fmt: skip

    def linear():
        x, y = new(B, N, C), new(B, N, 3 * C)
        run("linear_fwd", x, new(3 * C, C), new(3 * C), None, None, None, dtype, False)
        run("linear_bwd", y, x, new(3 * C, C), new(3 * C), None, None, None, [True] * 3 + [False])

    def linear_activation():
        x, z, w = new(B, N, C), new(B, N, F), new(F, C)
        run("linear_fwd", x, w, new(F), None, None, case.activation, dtype, True)
        run("linear_bwd", z, x, w, new(F), z, None, case.activation, [True] * 3 + [False])

    def mlp():
        x, z, w1, w2 = new(B, N, C), new(B, N, F), new(F, C), new(C, F)
        run("mlp_fwd", x, w1, new(F), w2, new(C), gamma(), x, case.activation, dtype, False, False)
        run("mlp_fwd", x, w1, new(F), w2, new(C), gamma(), x, case.activation, dtype, True, True)
        run("mlp_bwd", x, x, w1, w2, new(C), gamma(), z, None, case.activation, [True] * 5 + [case.layer_scale])

    def swiglu_mlp():
        P = padded(F)
        x, h, z, w3 = new(B, N, C), new(B, N, P), new(B, N, 2, P), new(C, P)
        if case.mlp == "packed":
            first = new(2 * F, C), new(2 * F), None, None
        else:
            first = new(F, C), new(F), new(F, C), new(F)
        if dtype.itemsize == 2:
            for save_z in (False, True):
                run("glu_fwd", x, *first, case.activation, False, save_z)
        else:  # PyTorch computes the products, which needs a GPU; only the gate is our kernel
            run("glu_gate", z, case.activation, False)
        run("linear_fwd", h, w3, new(C), gamma(), x, None, dtype, False)
        if not case.mlp_norm:
            run("glu_bwd", x, w3, gamma(), z, case.activation, False, True, True)
        else:
            w, statistics = new(F), [new(B * N, dtype=sums)] * 2
            options = False, None if P == F else F
            run("layer_norm_fwd", h, None, w, w, None, None, 1e-6, dtype, *options)
            run("layer_norm_bwd", h, None, h, None, w, None, None, *statistics, 1e-6, dtype,
                [False, True, True, True, False, False, False], *options)  # fmt: skip
            run("glu_gate", z, case.activation, False)
            run("glu_bwd", h, None, None, z, case.activation, False, False, True)

    def attention():
        qkv, o, lse = new(B, N, 3, H, D), new(B, N, H, D), new(B, H, N, dtype=sums)
        run("attention_qkvpacked_fwd", qkv, D**-0.5)
        run("attention_qkvpacked_bwd", o, qkv, o, lse, D**-0.5, True)

    def attend(B, N, H, D, *options, needs_dmask=False):
        qkv = new(B, N, 3, H, D)
        o, lse, *_ = run("attention_qkvpacked_fwd", qkv, D**-0.5, *options)
        run("attention_qkvpacked_bwd", o, qkv, o, lse, D**-0.5, True, needs_dmask, *options)

    def attention_varlen():
        q, lse = new(B * N, H, D), new(1, H, B * N, dtype=sums)
        options = False, None, None, False, 0.0, new(B + 1, dtype=torch.int32), N
        run("attention_fwd", q, q, q, D**-0.5, *options)
        run("attention_bwd", q, q, q, q, q, lse, D**-0.5, [True, True, False], *options)

    def attention_frozen_queries():
        q, lse = new(B, N, H, D), new(B, H, N, dtype=sums)
        run("attention_bwd", q, q, q, q, q, lse, D**-0.5, [False, True, False])

    def attention_rope(interleaved: bool):
        qkv, tables = new(B, N, 3, H, D), [new(1, 1, N - case.prefix, D, dtype=sums)] * 2
        q, weight = qkv.select(2, 0), new(D)
        spec = weight, weight, *tables, "layer", 1e-6, interleaved, case.prefix
        run("attention_prepare_fwd", q, None, None, *tables, "", 0.0, interleaved, case.prefix)
        run("attention_prepare_fwd", q, *spec)
        run("attention_prepare_bwd", q, q, None, None, *tables, "", 0.0, interleaved, case.prefix, [False, False])
        run("attention_prepare_bwd", q, q, *spec, [True, True])

    variants = {
        "biased": lambda: attend(B, N, H, D, new(1, H, N, N), needs_dmask=True),
        "key_mask": lambda: attend(B, N, H, D, new(B, 1, 1, N, dtype=torch.bool)),
        "pair_mask": lambda: attend(B, N, H, D, new(B, 1, N, N, dtype=torch.bool)),
        "causal": lambda: attend(B, N, H, D, None, None, True),
        "dropout": lambda: attend(B, N, H, D, None, new(1, dtype=torch.int64), False, 0.1),
        "windows": lambda: attend(64 * B, 49, 4, 32, new(1, 4, 49, 49), needs_dmask=True),
        "visible": lambda: attend(8 * B, 50, H, D),
        "varlen": attention_varlen,
        "frozen_queries": attention_frozen_queries,
        "rope_half": lambda: attention_rope(False),
        "rope_interleaved": lambda: attention_rope(True),
    }

    def patch_embed():
        side = case.image // case.patch * case.patch
        images, weight = new(B, 3, side, side), new(C, 3, case.patch, case.patch)
        prefix = new(1, case.prefix, C) if case.prefix else None
        run("patch_embed_fwd", images, weight, new(C), new(1, N, C), prefix, True, None, dtype)
        run("patch_embed_bwd", new(B, N, C), images, weight, True, True)

    def patch_embed_uint8():
        side = case.image // case.patch * case.patch
        weight, constants = new(C, 3, case.patch, case.patch), [0.5] * 3 + [0.25] * 3
        prefix = new(1, case.prefix, C) if case.prefix else None
        planar = new(B, 3, side, side, dtype=torch.uint8)
        channels_last = new(B, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # as decoders write
        # One layout compiles every kernel; only cases that list attention variants compile the other one, too.
        for images in (planar, channels_last) if case.attention else (planar,):
            run("patch_embed_fwd", images, weight, new(C), new(1, N, C), prefix, True, constants, dtype)
            run("patch_embed_bwd", new(B, N, C), images, weight, False, True, constants)

    functions = {case.norm: norm, f"add_{case.norm}": add_norm, "linear": linear}
    if case.mlp == "mlp":
        functions |= {"linear_activation": linear_activation, "mlp": mlp}
    else:
        functions["swiglu_mlp"] = swiglu_mlp
    functions |= {f"attention_{name}": variants[name] for name in case.attention}
    return functions | {f.__name__: f for f in (attention, patch_embed, patch_embed_uint8)}
