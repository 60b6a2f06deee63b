"""The table of workloads: for each op and variant its tensors at a :class:`Case`, the function to call, its reference.

``verify``, the benchmarks, the compiler's report and the tests all read this table; an op enters it once. A workload
calls its op with tensors by name and nothing but tensors and plain options, so that each tensor can be changed alone:
``norm_weight`` and ``eps`` here are ``norm=(norm_weight, norm_bias, eps)`` there. Shapes are written by letters, a
product for each dim: ``"3HD C"`` is (3·H·D, C); :func:`sizes` gives the letters their numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from vitkernels import ops, reference
from vitkernels.testing.cases import Case

CPU = torch.device("cpu")
NORMALIZE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's
PARTS = (1.0, 0.75, 0.25, 0.5)  # of the tokens, in turn for each packed image, as in NaViT (arXiv 2307.06304)


def sizes(case: Case) -> dict[str, int]:
    """Return the letters' numbers.

    B images, N tokens, C channels, H heads, D head dim, F hidden features; I image channels, P patch, Y and X sides of
    the image, R prefix tokens, G patches, W of them visible, S starts of packed images and T tokens of them all; V rows
    and U columns of patches, E entries of their relative positions, L those along one axis.
    """
    side, lengths = case.image // case.patch * case.patch, packed_lengths(case)
    patches = case.image // case.patch
    return {
        "B": case.batch, "N": case.tokens, "C": case.channels, "H": case.heads, "D": case.head_dim, "F": case.hidden,
        "I": 3, "P": case.patch, "Y": side, "X": side, "R": case.prefix, "G": patches**2, "W": -(-(patches**2) // 4),
        "S": case.batch + 1, "T": sum(lengths), "V": patches, "U": patches,
        "E": (2 * patches - 1) ** 2 + 3 * (case.prefix > 0), "L": 2 * patches - 1,
    }  # fmt: skip


def packed_lengths(case: Case) -> list[int]:
    """Return the tokens of each image of the varlen workload."""
    return [max(1, int(case.tokens * PARTS[i % len(PARTS)])) for i in range(case.batch)]


def shape_of(letters: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Return ``"3HD C"`` in numbers."""
    return tuple(
        math.prod(sizes[f] if f.isalpha() else int(f) for f in re.findall(r"\d+|[A-Z]", dim)) for dim in letters.split()
    )


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor of a workload.

    Attributes:
        shape: By letters.
        scale, shift: Of a normal distribution; None is the scale of weights that keep the size of their inputs.
        draw: Makes the tensor in another way, of ``(shape, case, device)``. An integer or bool tensor keeps its dtype.
        grad: Whether it requires a gradient.
        optional: Whether the op takes None in its place.
        needs: The attribute of a case without which the tensor is left out.
    """

    shape: str
    scale: float | None = 1.0
    shift: float = 0.0
    draw: Callable[[tuple[int, ...], Case, torch.device], Tensor] | None = None
    grad: bool = True
    optional: bool = False
    needs: str = ""


@dataclasses.dataclass(frozen=True)
class Workload:
    """An op as a network calls it.

    Attributes:
        name: A name. Of workloads that share it, the last that a case has counts.
        op: The public function's name.
        inputs: Its tensors by name.
        options: Its other arguments, of a case.
        variant: What is special, for reports, with the case's attributes in braces; None if ``verify`` leaves it out,
            as another one holds more.
        only: The attributes of the cases whose network has it.
        attention: The name by which :attr:`Case.attention` asks for it, if not every case runs it.
        plain: The reference, if not the one of the op's name.
    """

    name: str
    op: str
    inputs: Mapping[str, Input]
    options: Callable[[Case], dict] = lambda case: {}
    variant: str | None = ""
    only: Mapping[str, object] = dataclasses.field(default_factory=dict)
    attention: str = ""
    plain: Callable[..., Tensor] | None = None

    def of(self, case: Case) -> bool:
        """Tell whether the network of ``case`` has it."""
        return all(getattr(case, name) == value for name, value in self.only.items())

    def draw(
        self, case: Case, dtype: torch.dtype, device: torch.device, *, on: torch.device = CPU, **changed: int
    ) -> dict[str, Tensor]:
        """Draw the tensors in fp64, round them to ``dtype`` and move them to ``device``.

        Args:
            case: The sizes.
            dtype, device: Of the tensors.
            on: Where to draw. On the CPU a seed gives the same values for every device; on a GPU it takes no time.
            **changed: Sizes by letter, in place of the case's.
        """
        letters, tensors = sizes(case) | changed, {}
        for name, spec in self.inputs.items():
            if spec.needs and not getattr(case, spec.needs):
                continue
            shape = shape_of(spec.shape, letters)
            if spec.draw is not None:
                x = spec.draw(shape, case, on)
            else:
                scale = math.prod(shape[1:]) ** -0.5 if spec.scale is None else spec.scale
                x = torch.randn(shape, dtype=torch.float64, device=on) * scale + spec.shift
            floating = x.is_floating_point()
            x = x.to(dtype) if floating else x
            x = x if on == device else x.to(device)  # of a fake tensor even a GPU's own needs the GPU
            tensors[name] = x.requires_grad_(floating and spec.grad)
        return tensors

    def function(self, case: Case, **tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Call the public function on ``tensors``."""
        return call_op(self.op, **tensors, **self.options(case))

    def reference(self, case: Case, **tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute the same in plain PyTorch."""
        if self.plain is not None:
            return self.plain(**tensors, **self.options(case))
        return call_reference(self.op, **tensors, **self.options(case))

    def packed(self) -> Workload:
        """Return this workload of ``attention`` for ``attention_qkvpacked``."""
        inputs = {name: spec for name, spec in self.inputs.items() if name not in _QKV}
        return dataclasses.replace(self, op="attention_qkvpacked", inputs=_PACKED | inputs)


def workloads(case: Case) -> Iterator[Workload]:
    """Yield every workload that ``case`` has and asks for."""
    return (w for w in WORKLOADS if w.of(case) and (not w.attention or w.attention in case.attention))


def find(name: str, case: Case) -> Workload:
    """Return the workload ``name`` of ``case``, whether or not the case asks for it."""
    return [w for w in WORKLOADS if w.name == name and w.of(case)][-1]


def call_op(op: str, /, **arguments):
    """Call the public function ``op`` with tensors and options by the names that workloads give them."""
    return getattr(ops, op)(**_nested(op, arguments))


def call_reference(op: str, /, **arguments):
    """Compute in plain PyTorch what :func:`call_op` does, with the dropout that the op draws from the same seed."""
    arguments.pop("recompute", None)
    arguments = _nested(op, arguments)
    if op in ("window_attention", "relative_attention", "decomposed_attention"):
        return _call_windows(op, **arguments)
    if op == "attention_varlen":
        del arguments["max_seqlen"]
        rope, q_norm, k_norm = _take(arguments, "rope", "q_norm", "k_norm")
        q, k = reference.prepare_qk(*(arguments[n].transpose(0, 1)[None] for n in "qk"), rope, 0, q_norm, k_norm)
        arguments |= {"q": q[0].transpose(0, 1), "k": k[0].transpose(0, 1)}
    elif op.startswith("attention") and (p := arguments.pop("dropout_p", 0.0)):
        q, k = arguments["qkv"].transpose(1, 3).unbind(2)[:2] if "qkv" in arguments else map(arguments.get, "qk")
        seed = int(torch.randint(2**62, (1,), device=q.device))
        arguments["dropout_scale"] = reference.dropout_scale(seed, (*q.shape[:3], k.shape[2]), p).to(q.device)
    return getattr(reference, op)(**arguments)


def _call_windows(
    op: str, /, qkv: Tensor, window_size=None, grid_size=None, shift=0, dropout_p: float = 0.0, **given: object
) -> Tensor:
    """Compute attention in windows of images (B, Y, X, 3, H, D), or relative attention on tokens (B, N, 3, H, D)."""
    image = grid_size if op == "relative_attention" else tuple(qkv.shape[1:3])
    window = image if window_size is None else window_size
    (rows, columns), shift = (x if isinstance(x, tuple) else (x, x) for x in (window, shift))
    if op == "decomposed_attention":
        given["rel_pos"] = given.pop("rel_pos_h"), given.pop("rel_pos_w")
    tokens = qkv if qkv.ndim == 5 else qkv.flatten(1, 2)
    if dropout_p:
        seed, count = int(torch.randint(2**62, (1,), device=qkv.device)), -(-image[0] // rows) * -(-image[1] // columns)
        shape = (len(qkv) * count, qkv.shape[-2], *[given.get("num_prefix_tokens", 0) + rows * columns] * 2)
        given["dropout_scale"] = reference.dropout_scale(seed, shape, dropout_p).to(qkv.device)
    out = reference.window_attention(tokens, image, (rows, columns), shift=shift, **given)
    return out if qkv.ndim == 5 else out.unflatten(1, image)


def _nested(op: str, arguments: dict) -> dict:
    """Put tensors and options into the tuples that ``op`` takes."""
    if op == "swiglu_mlp":
        w1, w2, b1, b2, *norm = _take(arguments, "w1", "w2", "b1", "b2", "norm_weight", "norm_bias", "eps")
        if arguments.get("w12") is None:
            arguments |= {"w12": (w1, w2), "b12": None if b1 is None else (b1, b2)}
        arguments.setdefault("b12", None)
        arguments["norm"] = None if norm[2] is None else tuple(norm)
    elif op == "lora_mlp":
        pairs = {name: _take(arguments, f"{name}_a", f"{name}_b") for name in ("lora1", "lora2")}
        arguments |= {name: None if pair[0] is None else pair for name, pair in pairs.items()}
    elif op == "block":
        for layer in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2"):
            arguments[layer] = _take(arguments, f"{layer}_weight", f"{layer}_bias")
        arguments["layer_scale"] = _take(arguments, "gamma1", "gamma2")
        arguments["drop_path_scale"] = _take(arguments, "drop_path1", "drop_path2")
    elif op.startswith("attention"):
        cos, sin, interleaved = _take(arguments, "cos", "sin", "interleaved")
        if cos is not None or sin is not None:
            arguments["rope"] = (cos, sin, interleaved)
        for x in ("q", "k"):
            weight, bias, eps, kind = _take(arguments, f"{x}_weight", f"{x}_bias", f"{x}_eps", f"{x}_kind")
            if kind is not None:
                arguments[f"{x}_norm"] = (weight, bias, eps, kind == "rms")
    return arguments


def _take(arguments: dict, *names: str) -> tuple:
    return tuple(arguments.pop(name, None) for name in names)


_weight = functools.partial(Input, scale=None)
_bias = functools.partial(Input, optional=True)


def _affine(prefix: str, channels: str) -> dict[str, Input]:
    """Weight and bias of a norm."""
    return {f"{prefix}weight": _bias(channels, 0.5, 1.0), f"{prefix}bias": _bias(channels)}


def _drop_path(shape: tuple[int, ...], case: Case, device: torch.device) -> Tensor:
    scales = torch.full(shape, 1.25, device=device)
    scales[: shape[0] > 1] = 0.0  # the first of several samples is dropped
    return scales


def _mask(shape: tuple[int, ...], case: Case, device: torch.device) -> Tensor:
    """Draw a bool mask without the last key; of masks of pairs, one query per image has no key."""
    mask = torch.rand(shape, device=device) > 0.3
    mask[..., 0] = True
    mask[..., -1] = False
    if shape[2] > 1:
        mask[:, :, shape[2] // 2] = False
    return mask


def _starts(shape: tuple[int, ...], case: Case, device: torch.device) -> Tensor:
    return torch.tensor([0, *packed_lengths(case)]).cumsum(0).int().to(device)


def _hidden(shape: tuple[int, ...], case: Case, device: torch.device) -> Tensor:
    """Draw which patches are hidden: of each image the first and about four in ten."""
    mask = torch.rand(shape, device=device) < 0.4
    mask[:, 0] = True
    return mask


def _visible(shape: tuple[int, ...], case: Case, device: torch.device) -> Tensor:
    """Draw distinct patches for each image, in any order."""
    return torch.rand((shape[0], case.tokens - case.prefix), device=device).argsort(1)[:, : shape[1]].contiguous()


def _pixels(shape: tuple[int, ...], case: Case, device: torch.device) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, device=device)


def _table(function: Callable[[Tensor], Tensor], interleaved: bool) -> Input:
    """RoPE's table: the cosines or the sines."""

    def draw(shape: tuple[int, ...], case: Case, device: torch.device) -> Tensor:
        fp64 = {"dtype": torch.float64, "device": device}
        angles = torch.arange(shape[0], **fp64)[:, None] * torch.linspace(1.0, 0.01, shape[1] // 2, **fp64)
        return function(angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 2))

    return Input("G D", draw=draw, grad=False)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, **biases: Tensor) -> Tensor:
    return reference.attention_weights(q, k, **biases) @ v


def _plain_packed(qkv: Tensor, **biases: Tensor) -> Tensor:
    return _plain_attention(*qkv.transpose(1, 3).unbind(2), **biases).transpose(1, 2)


def _log_sizes(shape: tuple[int, ...], case: Case, device: torch.device) -> Tensor:
    """Draw the logarithms of how many tokens were merged into each: 1 to 8."""
    return torch.randint(1, 9, shape, device=device).double().log()


def _attention(name: str, variant: str, inputs: Mapping[str, Input] | None = None, plain=None, **options) -> Workload:
    inputs = _QKV if inputs is None else _QKV | inputs
    return Workload(
        f"attention_{name}", "attention", inputs, lambda case: options, variant, attention=name, plain=plain
    )


def _rope(name: str, variant: str, interleaved: bool) -> tuple[Workload, Workload]:
    inputs = {f"{x}_weight": Input("D", 0.3, 1.0) for x in "qk"}
    inputs |= {f.__name__: _table(f, interleaved) for f in (torch.cos, torch.sin)}
    options = {"q_kind": "rms", "q_eps": 1e-6, "k_kind": "rms", "k_eps": 1e-6, "interleaved": interleaved}
    made = _attention(name, f"RoPE of {variant}, QK-norm", inputs)
    made = dataclasses.replace(made, options=lambda case: options | {"num_prefix_tokens": case.prefix})
    return made, made.packed()


def _key_bias() -> tuple[Workload, Workload]:
    made = _attention("key_bias", "key bias", {"key_bias": Input("B N", draw=_log_sizes)}, _plain_attention)
    return made, dataclasses.replace(made.packed(), plain=_plain_packed)


def _windows(name: str, variant: str, window: int, inputs: Mapping[str, Input], **options: object) -> Workload:
    """Attention in windows of ``window`` rows and columns, or over a grid of them."""
    table = {"bias_table": _bias(f"{(2 * window - 1) ** 2} H")}
    return Workload(
        f"attention_{name}", "window_attention", {"qkv": Input("B V U 3 H D")} | table | inputs,
        lambda case: {"window_size": window} | options, variant, attention=name,
    )  # fmt: skip


def _decomposed(name: str, variant: str, window: int | None = None) -> Workload:
    """SAM's attention over the image, or in windows of ``window`` rows and columns."""
    length, padding = ("L", {}) if window is None else (f"{2 * window - 1}", {"padding": _bias("3 H D")})
    tables = {f"rel_pos_{axis}": Input(f"{length} D", 0.3) for axis in "hw"}
    return Workload(
        f"attention_{name}", "decomposed_attention", {"qkv": Input("B V U 3 H D")} | tables | padding,
        lambda case: {} if window is None else {"window_size": window}, variant, attention=name,
    )  # fmt: skip


def _relative(case: Case) -> dict:
    return {"grid_size": (case.image // case.patch,) * 2, "num_prefix_tokens": case.prefix}


def _activation(case: Case) -> dict:
    return {"activation": case.activation}


def _norms(op: str, inputs: dict[str, Input]) -> Iterator[Workload]:
    only, add = {"norm": op}, f"add_{op}"
    summed = inputs | {"residual": _X}
    scaled = summed | {"layer_scale": _GAMMA}
    with_path = scaled | {"drop_path_scale": _PATH}
    yield Workload(op, op, inputs, only=only)
    # With inputs of ordinary size the variance would hide an error in eps.
    yield Workload(f"{op}_near_eps", op, inputs | {"x": Input("B N C", 1e-3)}, variant="variance near eps", only=only)
    yield Workload(add, add, summed, only=only)
    yield Workload(add, add, scaled, variant=None, only=only)
    yield Workload(f"{add}_scaled", add, with_path, variant="scaled", only=only | {"layer_scale": True})


def _gated(mlp: str, norm: bool, recompute: bool) -> Workload:
    first = {"w12": _weight("2F C"), "b12": _bias("2F")}
    if mlp == "separate":
        first = {"w1": _weight("F C"), "b1": _bias("F"), "w2": _weight("F C"), "b2": _bias("F")}

    def options(case: Case) -> dict:
        return _activation(case) | ({"eps": 1e-6} if case.mlp_norm else {}) | ({"recompute": True} if recompute else {})

    return Workload(
        "swiglu_mlp_recompute" if recompute else "swiglu_mlp",
        "swiglu_mlp",
        {"x": _X, **first, **(_affine("norm_", "F") if norm else {}), "w3": _weight("C F"), "b3": _bias("C"), **_ADDED},
        options,
        f"{mlp} weights" + ", norm" * norm + ", recompute" * recompute,
        {"mlp": mlp, "mlp_norm": norm},
    )


_X = Input("B N C")
_PATH, _OTHER_PATH = (
    Input("B", draw=draw, grad=False, optional=True) for draw in (_drop_path, lambda *of: _drop_path(*of).flip(0))
)
_GAMMA = _bias("C", needs="layer_scale")
_ADDED = {"residual": _bias("B N C"), "layer_scale": _bias("C", 0.2, needs="layer_scale")}
_NORM = {"x": Input("B N C", 2.0, 0.5), **_affine("", "C")}
_MLP = {"x": _X, "w1": _weight("F C"), "b1": _bias("F"), "w2": _weight("C F"), "b2": _bias("C"), **_ADDED}
_LORA_MLP = _MLP | {
    "lora1_a": _weight("8 C"), "lora1_b": _weight("F 8"), "lora2_a": _weight("8 F"), "lora2_b": _weight("C 8"),
}  # fmt: skip
_FC1 = {"x": _X, "weight": _weight("F C"), "bias": _bias("F")}
_QKV = dict.fromkeys(("q", "k", "v"), Input("B H N D"))
_PACKED = {"qkv": Input("B N 3 H D")}
_MERGING = {"x": Input("B V U C"), "weight": _weight("2C 4C")}
_PATCHES = {
    "images": Input("B I Y X"), "weight": _weight("C I P P"), "bias": _bias("C"), "pos_embed": _bias("1 N C"),
    "prefix_tokens": _bias("1 R C", needs="prefix"),
}  # fmt: skip
_BLOCK = {
    "x": _X, **_affine("norm1_", "C"), "qkv_weight": _weight("3HD C"), "qkv_bias": _bias("3HD"),
    "proj_weight": _weight("C HD"), "proj_bias": _bias("C"), **_affine("norm2_", "C"), "fc1_weight": _weight("F C"),
    "fc1_bias": _bias("F"), "fc2_weight": _weight("C F"), "fc2_bias": _bias("C"), "gamma1": _GAMMA, "gamma2": _GAMMA,
}  # fmt: skip


_UNGATED = {"mlp": "mlp"}
_PLAIN_BLOCK = {"mlp": "mlp", "norm": "layer_norm"}

WORKLOADS = (
    *_norms("layer_norm", _NORM),
    *_norms("rms_norm", {name: _NORM[name] for name in ("x", "weight")}),
    Workload("linear", "linear", {"x": _X, "weight": _weight("3C C"), "bias": _bias("3C")}),
    Workload("linear_residual", "linear", {"x": _X, "weight": _weight("C C"), "bias": _bias("C"), **_ADDED},
             variant="residual"),
    Workload("linear_scaled", "linear", _FC1 | {"layer_scale": _bias("F", 0.2, needs="layer_scale")},
             _activation, "{activation}", _UNGATED),
    Workload("linear_activation", "linear", _FC1, _activation, None, _UNGATED),
    Workload("mlp", "mlp", _MLP, _activation, only=_UNGATED),
    Workload("mlp_drop_path", "mlp", _MLP | {"drop_path_scale": _PATH}, _activation, "DropPath", _UNGATED),
    Workload("mlp_recompute", "mlp", _MLP, lambda case: _activation(case) | {"recompute": True}, "recompute", _UNGATED),
    Workload("lora_linear", "lora_linear",
             {"x": _X, "weight": _weight("C C"), "bias": _bias("C"), "lora_a": _weight("8 C"), "lora_b": _weight("C 8"),
              **_ADDED}, attention="lora"),
    Workload("lora_mlp", "lora_mlp", _LORA_MLP, _activation, only=_UNGATED, attention="lora"),
    *(_gated(mlp, norm, r) for mlp in ("packed", "separate") for norm in (False, True) for r in (False, True)),
    Workload("attention_separate", "attention", _QKV),
    Workload("attention", "attention_qkvpacked", _PACKED),
    # If the bias needs a gradient, PyTorch's attention computes half precision in fp32, which is no fair yardstick.
    _attention("biased", "learned bias", {"attn_mask": Input("H N N")}, _plain_attention),
    *_key_bias(),
    _attention("key_mask", "key mask", {"attn_mask": Input("B 1 1 N", draw=_mask)}),
    _attention("pair_mask", "pair mask", {"attn_mask": Input("B 1 N N", draw=_mask)}),
    _attention("causal", "causal", is_causal=True),
    _attention("dropout", "dropout", dropout_p=0.3),
    *_rope("rope_half", "halves", False),
    *_rope("rope_interleaved", "neighbours", True),
    Workload("attention_varlen", "attention_varlen",
             dict.fromkeys(("q", "k", "v"), Input("T H D")) | {"cu_seqlens": Input("S", draw=_starts)},
             lambda case: {"max_seqlen": max(packed_lengths(case))}, attention="varlen"),
    _windows("swin", "shifted windows of 7", 7, {"padding": _bias("3 H D")}, shift=3),
    _windows("swin_cosine", "cosine windows of 8", 8, {"logit_scale": Input("H", 1.0, 10.0)}, shift=4),
    _windows("swin_wide", "shifted windows of 12", 12, {}, shift=6, roll_padded=True),
    _windows("swin_dropout", "windows of 2, dropout", 2, {}, dropout_p=0.3),
    _windows("swin_grid", "grid of 4", 4, {}, grid=True),
    Workload("attention_relative", "relative_attention", _PACKED | {"bias_table": _bias("E H")}, _relative,
             attention="relative"),
    _decomposed("decomposed", "decomposed positions"),
    _decomposed("decomposed_windows", "decomposed positions in windows of 14", 14),
    *(Workload(f"patch_merging{end}", "patch_merging", _MERGING | _affine("norm_", width), lambda case, last=last: last,
               variant, attention=asked)
      for end, width, last, variant, asked in (("", "4C", {}, "", "swin"),
                                               ("_v2", "2C", {"norm_last": True}, "norm last", "swin_cosine"))),
    Workload("block", "block", _BLOCK, lambda case: _activation(case) | {"num_heads": case.heads},
             only=_PLAIN_BLOCK),
    Workload("block_drop_path", "block", _BLOCK | {"drop_path1": _PATH, "drop_path2": _OTHER_PATH},
             lambda case: _activation(case) | {"num_heads": case.heads}, "DropPath", _PLAIN_BLOCK),
    Workload("patch_embed", "patch_embed", _PATCHES),
    Workload("patch_embed_uint8", "patch_embed", _PATCHES | {"images": Input("B I Y X", draw=_pixels)},
             lambda case: {"normalize": NORMALIZE}, "uint8"),
    Workload("patch_embed_masked", "patch_embed",
             _PATCHES | {"mask": Input("B G", draw=_hidden), "mask_token": Input("C")}, variant="masked",
             attention="visible"),
    Workload("patch_embed_visible", "patch_embed", _PATCHES | {"visible": Input("B W", draw=_visible)},
             variant="visible", attention="visible"),
)  # fmt: skip
