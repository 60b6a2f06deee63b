"""The launches of every op's forward and backward at a case's shapes, on fake tensors: what there is to compile.

A workload runs on the meta device, which computes nothing, and the launchers of the registered ops that it calls run on
tensors of the same layouts. Launches that no workload makes, but a block or a model does, are made here by hand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitkernels.ops._fp8 import E4M3, rows
from vitkernels.ops._registry import OPS
from vitkernels.runtime import use_backend, wide_dtype
from vitkernels.testing.cases import Case
from vitkernels.testing.workloads import Workload, find, workloads

META = torch.device("meta")
# Workloads whose kernels others launch, too.
LEFT_OUT = {
    "layer_norm_near_eps", "rms_norm_near_eps", "add_layer_norm_scaled", "add_rms_norm_scaled", "linear_residual",
    "linear_scaled", "lora_linear", "mlp_recompute", "mlp_drop_path", "swiglu_mlp_recompute", "attention_separate",
    "block", "block_drop_path",
}  # fmt: skip
# Where that is no whole training step: the workloads, whether in training, and the registered ops taken from them.
STEPS = {
    "mlp": (("mlp", False, "mlp_fwd"), ("mlp", True, "mlp_fwd"), ("mlp_recompute", True, "mlp_bwd")),
    "swiglu_mlp": (("swiglu_mlp_recompute", True, ("glu_", "linear_fwd", "layer_norm")),),
    "patch_merging": (("patch_merging", True, "merge_norm"),),
    "patch_merging_v2": (("patch_merging_v2", True, "patch_embed"),),
}
# What the contract's kernels are compiled with, in place of the workloads' values.
CONSTANTS = {"dropout_p": 0.1, "normalize": ((0.5,) * 3, (0.25,) * 3)}


def launches(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return for each op a function that launches its kernels as a training step of ``case`` does.

    The functions create their tensors on device ``cuda``. Call them through :func:`vitkernels.tools.aot.trace`, which
    makes these tensors fake, so that they need no GPU.
    """
    B, N, H, D, R = case.batch, case.tokens, case.heads, case.head_dim, case.prefix
    wide = wide_dtype(dtype)

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def traced(name: str, **changed: int) -> Callable[[], None]:
        def run():
            for workload, trains, taken in STEPS.get(name, ((name, True, ""),)):
                _launch(c for c in _calls(find(workload, case), case, dtype, trains, changed) if c[0].startswith(taken))

        return run

    def add_norm():
        calls = _calls(find(f"add_{case.norm}", case), case, dtype, True, {})
        # In a block there is no gradient for the branch, and sums give those of the projection's bias and LayerScale.
        name, (dy, dr, r, _, weight, _, *more) = calls[-1]
        more[5] = [False, *more[5][1:4], False, True, True]
        _launch([*calls, (name, (dy, dr, r, None, weight, None, *more))])

    def frozen_queries():
        q, lse = new(B, N, H, D), new(B, H, N, dtype=wide)
        OPS["attention_bwd"].launcher(q, q, q, q, q, lse, D**-0.5, [False, True, False])

    def cast():  # autocast's, of fp32 weights
        C, F = case.channels, case.hidden
        shapes = ((3 * C, C), (3 * C,), (C, C), (C,), (F, C), (F,), (C, F), (C,))
        first, *others = (new(*shape, dtype=torch.float32) for shape in shapes)
        OPS["cast"].launcher(first, others, dtype)

    def rope(interleaved: bool):
        q, weight, tables = new(B, N, 3, H, D).select(2, 0), new(D), [new(1, 1, N - R, D, dtype=wide)] * 2
        for parameters, norm in (((None, None), ("", 0.0)), ((weight, weight), ("layer", 1e-6))):
            spec = *parameters, *tables, *norm, interleaved, R
            OPS["attention_prepare_fwd"].launcher(q, *spec)
            OPS["attention_prepare_bwd"].launcher(q, q, *spec, [norm[0] != ""] * 2)

    def block_fp8():
        if rows.arch_limit(torch.device("cuda")) is not None:
            return
        C, F, gamma = case.channels, case.hidden, new(case.channels) if case.layer_scale else None
        x, affine = new(B, N, C), (new(C), new(C))
        normed, scale, _ = OPS["rows_fp8"].launcher(x, None, *affine, None, 1e-6)

        def product(x: Tensor, scale: Tensor, features: int, gamma=None, residual=None, activation=None, out=dtype):
            weight = new(features, x.shape[-1], dtype=E4M3), new(1, features, dtype=torch.float32)
            operands = (x, scale, *weight, new(features), gamma, residual)
            return OPS["product_fp8"].launcher(*operands, activation, out)

        product(normed, scale, 3 * C)
        product(*OPS["rows_fp8"].launcher(new(B, N, C), None, None, None, None, None)[:2], C)
        normed, scale, r = OPS["rows_fp8"].launcher(new(B, N, C), x, *affine, gamma, 1e-6)
        product(*product(normed, scale, F, activation=case.activation, out=E4M3), C, gamma, r)

    found = {w.name: traced(w.name) for w in workloads(case) if w.name not in LEFT_OUT}
    by_hand = {
        "windows": traced("attention_biased", B=64 * B, N=49, H=4, D=32),
        "visible": traced("attention", B=8 * B, N=50),
        "varlen": traced("attention_varlen", T=B * N),
        "swin": traced("attention_swin", B=4 * B, V=56, U=56, H=3, D=32),  # Swin-T's first stage
        "swin_cosine": traced("attention_swin_cosine", B=2 * B, V=64, U=64, H=4, D=32),  # Swin V2-B's
        "swin_wide": traced("attention_swin_wide", B=B, V=96, U=96, H=4, D=32),  # Swin-B's at 384 pixels
        "decomposed": traced("attention_decomposed", B=B // 16, V=64, U=64, L=127, H=12, D=64),  # SAM-B's
        "decomposed_windows": traced("attention_decomposed_windows", B=B // 16, V=64, U=64, H=12, D=64),
        "frozen_queries": frozen_queries,
        "rope_half": functools.partial(rope, False),
        "rope_interleaved": functools.partial(rope, True),
    }
    asked_for = {f"attention_{name}": by_hand[name] for name in by_hand if name in case.attention}
    if case.layer_scale and case.mlp == "mlp":  # trained with DropPath
        asked_for |= {"mlp_drop_path": traced("mlp_drop_path"), "cast": cast}
    if dtype.itemsize == 2 and (case.norm, case.mlp) == ("layer_norm", "mlp"):
        found["block_fp8"] = block_fp8
    return found | {f"add_{case.norm}": add_norm} | asked_for


def _calls(
    workload: Workload, case: Case, dtype: torch.dtype, trains: bool, changed: dict[str, int]
) -> list[tuple[str, tuple]]:
    """Return the registered ops that ``workload`` calls, with arguments on the meta device, equal calls once."""
    workload = workload.packed() if workload.op == "attention" else workload  # as models call it
    options = {name: CONSTANTS.get(name, value) for name, value in workload.options(case).items()}
    workload = dataclasses.replace(workload, options=lambda case: options)
    tensors = workload.draw(case, dtype, META, on=META, **changed)
    with use_backend("auto"), torch.set_grad_enabled(trains), _Recorded() as recorded:
        layouts = [tensors]
        # One layout of images compiles every kernel; cases that list attention variants compile the decoders', too.
        if workload.name == "patch_embed_uint8" and case.attention:
            images = tensors["images"].contiguous(memory_format=torch.channels_last)
            layouts.append(tensors | {"images": images})
        for given in layouts:
            outputs = workload.function(case, **given)
            if trains:
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
    return list(recorded.calls.values())


class _Recorded(TorchDispatchMode):
    """Keeps the calls of registered ops in place of running them."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, tuple[str, tuple]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "vitkernels":
            return func(*args, **(kwargs or {}))
        name = func.name().removeprefix("vitkernels::")
        layouts = [(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]
        self.calls.setdefault(f"{name} {layouts}", (name, args))
        return OPS[name].fake(*args)


def _launch(calls: Iterable[tuple[str, tuple]]) -> None:
    """Run the launchers of ``calls`` on new tensors of the same layouts.

    As the contract counts the bytes of DRAM, the activations of a call share their memory if they have one shape, and
    so do all tensors of a gated MLP's norm.
    """
    for name, args in calls:
        made: dict[object, Tensor] = {}
        gated_norm = name.startswith("layer_norm") and type(args[-1]) is int  # its width

        def real(x: object, made=made, gated_norm=gated_norm) -> object:
            if not isinstance(x, Tensor):
                return x
            key = (x.shape, x.dtype) if x.ndim > 2 or gated_norm else id(x)
            if key not in made:
                flat = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype, device="cuda")
                made[key] = flat.as_strided(x.shape, x.stride(), flat.storage_offset() + x.storage_offset())
            return made[key]

        args = [real(a) for a in args]
        if name == "attention_qkvpacked_bwd":
            args[5] = args[1].dtype  # in a block, the dtype of the sum that is the projection's bias gradient
        if name == "glu_fwd":
            if args[0].itemsize > 2:
                continue  # PyTorch computes the products, which needs a GPU
            OPS[name].launcher(*args[:-1])  # in inference it saves nothing
        OPS[name].launcher(*args)
