"""The fuzzer is no use if it sees nothing: seeded defects of the public functions, each found in a dozen fp32 calls.

The defects are around the functions, not in kernels: these run in PyTorch, which compiles nothing.
"""

import dataclasses
import random

import hypothesis
import pytest
import torch
from calls import OPS, Call, judge
from strategies import CALLS, FP8_CALLS

CALLS = CALLS | FP8_CALLS
EXAMPLES = 12


def with_argument(name, change):
    """A function whose argument ``name`` is changed where it is given."""

    def mutate(function):
        def call(**arguments):
            if arguments.get(name) is not None:
                arguments[name] = change(arguments[name])
            return function(**arguments)

        return call

    return mutate


def without_gradient(t):
    return t.detach() + 0 * t


def looks_everywhere(mask):
    return torch.ones_like(mask) if mask.dtype == torch.bool else mask.nan_to_num() * 0


def tail_unmasked(function):
    """The last feature counts twice, as where a tail is read beyond its end."""

    def call(x, **arguments):
        y = function(x=x, **arguments)
        return y * (x.shape[-1] / (x.shape[-1] + 1)) if x.shape[-1] % 16 else y

    return call


def stale_row(function):
    def call(**arguments):
        y = function(**arguments)
        return torch.cat([y[..., :1, :], y[..., :-1, :]], -2) if y.shape[-2] > 1 else y

    return call


# By name: the op, the argument that a call must have for the defect to matter, and the defect.
DEFECTS = {
    "eps": ("layer_norm", "eps", with_argument("eps", lambda eps: eps + 1e-3)),
    "weight off by 0.1 %": ("rms_norm", "weight", with_argument("weight", lambda w: w * 1.001)),
    "missing bias gradient": ("linear", "bias", with_argument("bias", without_gradient)),
    "missing weight gradient": ("add_layer_norm", "weight", with_argument("weight", without_gradient)),
    "missing residual gradient": ("add_rms_norm", "residual", with_argument("residual", without_gradient)),
    "LayerScale off by 0.1 %": ("mlp", "layer_scale", with_argument("layer_scale", lambda g: g * 1.001)),
    "tanh for erf": ("mlp", "activation", with_argument("activation", lambda a: "gelu_tanh" if a == "gelu" else a)),
    "a tail": ("linear", "x", tail_unmasked),
    "gate and value swapped": ("swiglu_mlp", "gate_last", with_argument("gate_last", lambda last: not last)),
    "scale off by 0.1 %": ("attention", "scale", with_argument("scale", lambda scale: scale * 1.001)),
    "dropped mask": ("attention", "attn_mask", with_argument("attn_mask", looks_everywhere)),
    "causality": ("attention_qkvpacked", "is_causal", with_argument("is_causal", lambda causal: not causal)),
    "an image's last token": (
        "attention_varlen", "starts", with_argument("starts", lambda s: (*s[:-1], max(s[-2], s[-1] - 1))),
    ),
    "stale row": ("patch_embed", "images", stale_row),
    "prefix off by 0.1 %": ("patch_embed", "prefix_tokens", with_argument("prefix_tokens", lambda p: p * 1.001)),
    "mask token off by 0.1 %": ("patch_embed", "mask_token", with_argument("mask_token", lambda m: m * 1.001)),
    "order of the visible": ("patch_embed", "visible", with_argument("visible", lambda v: v.sort(-1).values)),
    "table along x reversed": ("decomposed_attention", "rel_pos_w", with_argument("rel_pos_w", lambda t: t.flip(0))),
    "missing gradient of a table": (
        "decomposed_attention", "rel_pos_h", with_argument("rel_pos_h", without_gradient),
    ),
    "patches merged by rows": (
        "patch_merging", "weight",
        with_argument("weight", lambda w: w.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)),
    ),
    "eps before FP8": ("layer_norm_fp8", "eps", with_argument("eps", lambda eps: eps + 1e-3)),
    "bias behind FP8 off by 0.1 %": ("linear_fp8", "bias", with_argument("bias", lambda b: b * 1.001)),
    "LayerScale of a block": ("block", "gamma2", with_argument("gamma2", lambda g: g * 1.01)),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_finds(defect):
    op, argument, mutate = DEFECTS[defect]
    mutant = mutate(OPS[op].function)
    calls = CALLS[op].filter(
        lambda call: (
            call.dtype == torch.float32
            and (argument in call.inputs or call.options.get(argument) is not None)
            and call.inputs.get("x", next(iter(call.inputs.values()))).shape[:1] != (0,)
        )
    )

    def is_caught(call: Call) -> bool:
        try:
            judge(dataclasses.replace(call, backend="torch"), mutant)
        except AssertionError:
            return True
        return False

    settings = hypothesis.settings(
        max_examples=EXAMPLES, phases=[hypothesis.Phase.generate], report_multiple_bugs=False
    )
    hypothesis.find(calls, is_caught, settings=settings, random=random.Random(1))
