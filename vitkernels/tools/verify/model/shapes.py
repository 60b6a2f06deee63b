"""Find the shapes that a model gives the ops: run an accelerated copy and record its calls of registered ops.

The copy runs on the meta device, which computes nothing. Every module that the swap knows is covered; a module that
keeps its own forward gives no shape.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels import swap
from vitkernels._intercept import Intercept
from vitkernels.swap.estimate import without_data
from vitkernels.testing.cases import Case
from vitkernels.tools.console import UserError
from vitkernels.tools.verify.model.load import Inputs


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Record the calls of vitkernels' registered ops: each op's name, and its arguments by name."""
    calls = []

    def record(op, args, kwargs, result):
        if op.namespace == "vitkernels":
            names = [argument.name for argument in op._schema.arguments]
            defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
            given = defaults | dict(zip(names, args, strict=False)) | kwargs
            # Keeping the tensors would keep their memory alive, and only their shapes are needed.
            given = {n: torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t for n, t in given.items()}
            calls.append((op.overloadpacket.__name__, given))

    with Intercept(saw=record):
        yield calls


def op_calls(model: nn.Module, inputs: Inputs) -> list[tuple[str, dict[str, Any]]]:
    """Return the op calls of an accelerated copy of ``model`` in evaluation mode, on the meta device if possible.

    Raises:
        UserError: The model does not run on ``inputs``.
    """
    try:
        return _calls(without_data(model), inputs.to("meta"))
    except Exception:  # a model that reads values of its tensors
        first = next(model.parameters(), None)
        try:
            return _calls(copy.deepcopy(model), inputs if first is None else inputs.to(first.device, first.dtype))
        except Exception as error:
            raise UserError(f"the model does not run on its inputs: {type(error).__name__}: {error}") from error


def _calls(model: nn.Module, inputs: Inputs) -> list[tuple[str, dict[str, Any]]]:
    swap.accelerate(model.eval())
    with torch.no_grad(), recorded_calls() as calls:
        model(*inputs.args, **inputs.kwargs)
    return calls


def shapes(model: nn.Module, inputs: Inputs, batch: int = 1) -> list[Case]:
    """Return a case of ``batch`` images for each kind of block in ``model``.

    A case has the model's grid of patches if that is square, else the largest square of patches that its tokens fill.
    All other tokens become prefix tokens.

    Raises:
        UserError: The model does not run on ``inputs``, or calls no op.
    """
    calls = op_calls(model, inputs)
    if not calls:
        raise UserError(f"no part of {type(model).__name__} runs on vitkernels: there are no shapes to verify")
    embedding = next((given for op, given in calls if op == "patch_embed_fwd"), None)
    return list(dict.fromkeys(_case(block, embedding, batch) for block in _blocks(calls)))


@dataclasses.dataclass
class _Block:
    tokens: int = 0
    channels: int = 0
    head_dim: int = 0
    hidden: int = 0
    activation: str = "gelu"
    layer_scale: bool = False
    norm: str = "layer_norm"
    mlp: str = "mlp"
    mlp_norm: bool = False
    attention: tuple[str, ...] = ()


def _blocks(calls: list[tuple[str, dict[str, Any]]]) -> Iterator[_Block]:
    """Split the calls into blocks: a new one begins at attention, or at an MLP if the present block has one."""
    block, norm, rope = _Block(), "layer_norm", ()
    for op, given in calls:
        attends = op in ("attention_fwd", "attention_qkvpacked_fwd")
        hidden = _hidden(op, given)
        if (attends and (block.head_dim or block.hidden)) or (hidden and block.hidden):
            yield block
            block = _Block()
        block.layer_scale |= given.get("gamma") is not None
        if op == "layer_norm_fwd":
            norm = "rms_norm" if given["rms"] else "layer_norm"
            block.norm, block.channels = norm, block.channels or given["x"].shape[-1]
            block.tokens = block.tokens or _rows(given["x"])
        elif op == "attention_prepare_fwd" and given["cos"] is not None:
            rope = ("rope_interleaved" if given["interleaved"] else "rope_half",)
        elif attends:
            q = given["qkv"].select(2, 0) if op == "attention_qkvpacked_fwd" else given["q"]
            N, H, D = (q.transpose(1, 2) if given.get("heads_first") else q).shape[-3:]
            block.tokens, block.head_dim, block.norm = N, D, norm
            block.channels = block.channels or H * D
            block.attention, rope = rope + _options(given), ()
        elif hidden:
            block.hidden, block.channels = hidden, given["x"].shape[-1]
            block.activation = given["activation"] or "gelu"
            block.tokens = block.tokens or _rows(given["x"])
            if op == "swiglu_mlp_fwd":
                block.mlp = "packed" if given["w2"] is None else "separate"
                block.mlp_norm = given["eps"] is not None
    yield block


def _hidden(op: str, given: dict[str, Any]) -> int:
    """Return the hidden features of the MLP that begins with ``op``, or 0 if none does."""
    if op == "mlp_fwd":
        return given["w1"].shape[0]
    if op == "linear_fwd" and given["activation"] is not None:
        return given["weight"].shape[0]
    if op == "swiglu_mlp_fwd":
        return given["w1"].shape[0] // (2 if given["w2"] is None else 1)
    return 0


def _options(given: dict[str, Any]) -> tuple[str, ...]:
    mask, found = given["mask"], []
    if mask is not None:
        pairs = mask.shape[-2] > 1
        found.append("biased" if mask.is_floating_point() and pairs else "pair_mask" if pairs else "key_mask")
    return (*found, *(["causal"] if given["is_causal"] else []), *(["varlen"] if given["starts"] is not None else []))


def _rows(x: Tensor) -> int:
    return max(1, math.prod(x.shape[1:-1]))


def _case(block: _Block, embedding: dict[str, Any] | None, batch: int) -> Case:
    N, C = max(1, block.tokens), block.channels or block.hidden
    patch, side = 4, math.isqrt(N)
    if embedding is not None:
        (rows, columns), patch = embedding["images"].shape[-2:], embedding["weight"].shape[-1]
        if rows == columns and (rows // patch) ** 2 <= N:
            side = rows // patch
        C = C or embedding["weight"].shape[0]
    return Case(
        f"{N} token{'s' * (N > 1)} of {C} channels",
        batch,
        side * patch,
        patch,
        N - side**2,
        C,
        # In a case the heads must divide the channels. If they do not in the model, the case keeps the head dim.
        max(1, C // block.head_dim) if block.head_dim else 1,
        block.hidden or C,
        block.activation,
        block.layer_scale,
        block.norm,
        block.mlp,
        block.mlp_norm,
        block.attention,
    )
