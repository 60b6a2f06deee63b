"""Which records can run their products in FP8, and the parameters' values in FP8.

A parameter is quantized once for each of its states. The values are kept beside it, in a table that holds neither the
parameter nor its module: nothing of a module's state changes, and copies and pickles know nothing of it. An entry
counts as long as the parameter is the same object with the same memory and the same version, which PyTorch raises with
each change in place (an optimizer's step, ``load_state_dict``); else the parameter is quantized again. PyTorch does not
count what is written through ``parameter.data``: behind such a write call :func:`forget` or ``accelerate``.
Compiled and exported graphs hold the quantization itself, so they follow every change.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from vitkernels import ops
from vitkernels.layers import records
from vitkernels.layers.records import Attention, Block, Mlp, Norm
from vitkernels.ops._fp8 import INPUTS
from vitkernels.ops._fp8.rows import MAX_ROW


class _Entry(NamedTuple):
    parameter: weakref.ref
    state: tuple
    quantized: ops.Fp8


_entries: dict[int, _Entry] = {}  # by the id of the parameter


def weight(parameter: Tensor) -> ops.Fp8:
    """Return the rows of ``parameter`` (out features, in features) in FP8, of its present state."""
    # A tensor made in inference mode has no version; a FakeTensor or a replica of DataParallel lives for one call.
    if is_compiling() or type(parameter) is not nn.Parameter or parameter.is_inference() or parameter.is_meta:
        with torch.no_grad():
            return ops.quantize_fp8(parameter.detach())
    key, state = id(parameter), _state(parameter)
    if (found := kept(parameter)) is not None:
        return found
    with torch.inference_mode(False), torch.no_grad():
        quantized = ops.quantize_fp8(parameter.detach())
    # In the capture of a CUDA graph the values would lie in the graph's memory: they are part of the graph alone.
    if not (parameter.is_cuda and torch.cuda.is_current_stream_capturing()):
        _entries[key] = _Entry(weakref.ref(parameter, lambda _: _entries.pop(key, None)), state, quantized)
    return quantized


def kept(parameter: Tensor) -> ops.Fp8 | None:
    """Return what :func:`weight` keeps of the present state of ``parameter``; None if it keeps nothing."""
    entry = _entries.get(id(parameter))
    if entry is None or entry.parameter() is not parameter or entry.state != _state(parameter):
        return None
    return entry.quantized


def _state(parameter: Tensor) -> tuple:
    return parameter._version, parameter.data_ptr(), parameter.dtype, parameter.device, parameter.shape


def forget(module: nn.Module) -> None:
    """Drop what is kept of the parameters of ``module``: they are quantized again when they are next needed."""
    for parameter in module.parameters():
        _entries.pop(id(parameter), None)


def limit(record: Block | Attention | Mlp) -> str | None:
    """Return why the products of ``record`` cannot run in FP8, or None if they can."""
    if isinstance(record, Block):
        return _norm_limit(record.norm1) or _norm_limit(record.norm2) or limit(record.attn) or limit(record.mlp)
    if isinstance(record, Attention):
        if record.norm is not None or record.gate is not None:
            return "its attention has a norm or a gate in front of its last layer"
    elif record.gated:
        return "its MLP is gated"
    elif record.norm is not None or record.input_norm is not None:
        return "its MLP has a norm"
    for layer in records.linears(record):
        if layer.group is not None:
            return "its layers are sharded over processes"
        if layer.lora is not None:
            return "an adapter of a layer does not run in FP8"
        width, dtype = layer.weight.shape[1], layer.weight.dtype
        if width % 16 or width > MAX_ROW:
            return f"a layer takes {width} features; FP8 takes a multiple of 16, at most {MAX_ROW}"
        if dtype not in INPUTS:
            return f"its parameters are {str(dtype).removeprefix('torch.')}; FP8 takes float16, bfloat16 or float32"
    return None


def _norm_limit(norm: Norm | None) -> str | None:
    if norm is None:
        return "it has no norm in front of a branch"
    return "its norms are RMSNorms; FP8 takes LayerNorms" if norm.rms else None


def check_inference(record: Block | Attention | Mlp, x: Tensor) -> None:
    """Require that no gradient is wanted, nothing is dropped, and no layer has got an adapter since.

    Raises:
        NotImplementedError: Something is, or a layer has.
    """
    if any(layer.lora is not None for layer in records.linears(record)):
        raise NotImplementedError(
            "fp8: a layer has got an adapter, which does not run in FP8: call vitkernels.accelerate(model) again"
        )
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in _tensors(record))):
        raise NotImplementedError(
            "fp8: a gradient is wanted, and FP8 is for inference: call the model within torch.no_grad() or "
            "torch.inference_mode(), or call vitkernels.accelerate(model) to train it"
        )
    if isinstance(record, Block):
        attn, mlp, paths = record.attn, record.mlp, record.drop_path1 or record.drop_path2
        drops = attn.attn_drop or attn.proj_drop or mlp.drop1 or mlp.drop2 or paths
    elif isinstance(record, Attention):
        drops = record.attn_drop or record.proj_drop
    else:
        drops = record.drop1 or record.drop2
    if drops:
        raise NotImplementedError("fp8: the model drops (dropout or DropPath), and FP8 is for inference: model.eval()")


def _tensors(record: object) -> list[Tensor]:
    if isinstance(record, Tensor):
        return [record]
    return [t for each in record for t in _tensors(each)] if isinstance(record, tuple) else []
