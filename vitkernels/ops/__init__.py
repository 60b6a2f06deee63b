"""Ops on tensors: each checks its input, then runs Triton kernels or, on a CPU, :mod:`vitkernels.reference`."""

from vitkernels.ops._attention import (
    QKNorm,
    Rope,
    attention,
    attention_provider,
    attention_qkvpacked,
    attention_varlen,
    attention_weights,
)
from vitkernels.ops._block import block
from vitkernels.ops._decomposed_attention import decomposed_attention
from vitkernels.ops._fp8 import Fp8, add_layer_norm_fp8, layer_norm_fp8, linear_fp8, quantize_fp8
from vitkernels.ops._layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from vitkernels.ops._linear import linear
from vitkernels.ops._lora import lora_linear, lora_mlp
from vitkernels.ops._mlp import mlp
from vitkernels.ops._patch_embed import patch_embed
from vitkernels.ops._patch_merging import patch_merging
from vitkernels.ops._registry import uses_kernels
from vitkernels.ops._swiglu import swiglu_mlp
from vitkernels.ops._window_attention import relative_attention, window_attention

__all__ = [
    "Fp8",
    "QKNorm",
    "Rope",
    "add_layer_norm",
    "add_layer_norm_fp8",
    "add_rms_norm",
    "attention",
    "attention_provider",
    "attention_qkvpacked",
    "attention_varlen",
    "attention_weights",
    "block",
    "decomposed_attention",
    "layer_norm",
    "layer_norm_fp8",
    "linear",
    "linear_fp8",
    "lora_linear",
    "lora_mlp",
    "mlp",
    "patch_embed",
    "patch_merging",
    "quantize_fp8",
    "relative_attention",
    "rms_norm",
    "swiglu_mlp",
    "uses_kernels",
    "window_attention",
]
