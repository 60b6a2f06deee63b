"""Calls with one thing wrong: a clear error before any launch, or, where it was not wrong after all, the right answer.

A drawn call is changed in one place: a rank, a size, a dtype, a device, something that is no tensor, a sparse one, an
option out of its range. Whoever refuses it does so with ValueError, TypeError or NotImplementedError that begins with
the op's name. How many calls, and for how long, is told in test_fuzz_ops.py; answers are judged with --fuzz-minutes
alone, and without nothing is launched.
"""

import contextlib
import dataclasses
import math
import time

import pytest
import torch
from calls import OPS, Call, Input, judge, on
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CALLS

DTYPES = (
    torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32,
    torch.float64,
)  # fmt: skip
VALUES = {
    "eps": (math.nan, -1.0, "small", None, (1e-6, -1.0), (math.nan, 1e-6), (1e-6,)),
    "q_eps": (math.nan, -1.0, math.inf, "small"),
    "k_eps": (math.nan, -1.0, math.inf, "small"),
    "activation": ("relu", 3),
    "scale": (math.nan, math.inf, "large", True),
    "dropout_p": (-0.1, 1.5, math.nan, "some"),
    "num_heads": (0, 7, -1, 2.5, "two"),
    "num_prefix_tokens": (-1, 10**6, 1.5, "one"),
    "starts": ((0,), (5, 2), (0, 10**6), (-1, 2), ()),
    "starts_dtype": (torch.float32, torch.bool),
    "window_size": (0, -1, 2.5, (7,), (7, 0), (1, 2, 3), "wide", None),
    "shift": (-1, 100, 1.5, (0,), (0, -1), "far", None),
    "grid_size": (0, (4, 0), (3,), (1, 2, 3), (10**6, 10**6), 2.5, "wide", None),
    "max_seqlen": (0, -1, 2.5, "long"),
    "normalize": (((0.5,), (0.2,)), 3, ((0.5,) * 3, (0.0,) * 3), ((math.nan,) * 3, (0.2,) * 3), ("a", "b"), None),
}


@st.composite
def wrong(draw, op: str) -> Call:
    """A call of ``op`` with one thing changed."""
    call = draw(CALLS[op])
    # Three that calls.py concatenates before the op sees them are left as they are.
    names = [n for n in call.inputs if not (op == "block" and n in ("q_bias", "k_bias", "v_bias"))]
    options = [n for n in call.options if n in VALUES]
    name = draw(st.sampled_from(names + options))
    if name in call.options:
        return dataclasses.replace(call, options={**call.options, name: draw(st.sampled_from(VALUES[name]))})
    return dataclasses.replace(call, inputs={**call.inputs, name: draw(_wrong_inputs(call.inputs[name]))})


@st.composite
def _wrong_inputs(draw, x: Input) -> Input:
    x = dataclasses.replace(x, layout="contiguous", grad=False)
    changes = ["rank", "dtype", "meta", "none", "text", "sparse", *(["size", "less"] if x.shape else [])]
    change = draw(st.sampled_from(changes))
    if change == "rank":
        return dataclasses.replace(x, shape=(*x.shape, 1) if draw(st.booleans()) else (1, *x.shape))
    if change == "less":
        return dataclasses.replace(x, shape=x.shape[1:] if draw(st.booleans()) else x.shape[:-1])
    if change == "size":
        i = draw(st.integers(0, len(x.shape) - 1))
        n = draw(st.sampled_from((0, 1, x.shape[i] + 1, 2 * x.shape[i])))
        return dataclasses.replace(x, shape=(*x.shape[:i], n, *x.shape[i + 1 :]))
    if change == "dtype":
        return dataclasses.replace(x, dtype=draw(st.sampled_from(DTYPES)))
    if change == "meta":
        return dataclasses.replace(x, device="meta")
    return dataclasses.replace(x, kind=change)


@contextlib.contextmanager
def launches(monkeypatch, run: bool):
    """The names of the kernels that are launched meanwhile, which do ``run`` or not."""
    import triton

    found = []
    original = triton.JITFunction.__getitem__

    def launch(self, grid):
        found.append(str(self))
        return original(self, grid) if run else lambda *args, **kwargs: None

    with monkeypatch.context() as patch:
        patch.setattr(triton.JITFunction, "__getitem__", launch)
        yield found


@pytest.mark.parametrize("op", CALLS)
def test_refuses_before_any_launch_or_answers_right(op, device, request, monkeypatch, without_plans):
    minutes = request.config.getoption("--fuzz-minutes", 0.0)

    @given(wrong(op))
    @settings(max_examples=200 if minutes else 60)
    def refuses(call: Call):
        tensors, _ = call.draw(call.seed, device)
        with launches(monkeypatch, run=minutes > 0) as launched, on(call.backend):
            error = None
            try:
                OPS[op].function(**tensors, **call.options)
            except (ValueError, TypeError, NotImplementedError) as refused:
                error = refused
        if error is not None:
            assert str(error).startswith(f"{op}: "), f"{type(error).__name__}: {error}"
            assert not launched, f"{launched} ran before {error}"
        elif minutes and all(x.device == "cpu" for x in call.inputs.values()):
            judge(call, device=device)

    end = time.monotonic() + 60 * minutes
    while True:
        refuses()
        if time.monotonic() >= end:
            return
