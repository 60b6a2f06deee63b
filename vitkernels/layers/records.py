"""What a fused forward reads of a module, as plain data.

:mod:`vitkernels.layers.fused` computes from these records alone. The functions below fill them from modules with timm's
attribute names; each library's file in :mod:`vitkernels.swap` fills them from that library's modules. A record is made
at each call, because parameters, dropout rates and the mode (training or eval) may change between calls.

Children and parameters are read from ``_modules`` and ``_parameters``: ``nn.Module.__getattr__`` would cost more than
all the rest of a block's record.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitkernels.layers import sharded


class Lora(NamedTuple):
    """``dropout(x) · aᵀ · bᵀ``, an update of low rank: a (rank, in), b (out, rank) with its scaling.

    Attributes:
        drop: Dropout probability in the present mode.
    """

    a: Tensor
    b: Tensor
    drop: float = 0.0


class Linear(NamedTuple):
    """``x · weightᵀ + bias``: weight (out, in), bias (out,) or None; and ``lora`` of x besides.

    With ``group``, weight and bias are this process's shards, but the bias of a row-parallel layer, which is whole.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora: Lora | None = None
    group: sharded.Group | None = None

    @property
    def plain(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, for who computes no adapter.

        Raises:
            RuntimeError: There is one, which would be ignored; the rule of who reads this must not take any.
        """
        if self.lora is not None:
            raise RuntimeError("a layer with an adapter is read as if it had none")
        return self[:2]


class Norm(NamedTuple):
    """LayerNorm, or RMSNorm with ``rms``, over the last dim; None in place of a record is the identity."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float | None
    rms: bool = False


class Windows(NamedTuple):
    """Attention within windows of an image, whose Y · X tokens are all that there are (:func:`ops.window_attention`).

    Padded tokens have the bias of the qkv projection, as where an image is padded with zeros before it.

    Attributes:
        image: Y and X.
        size: Rows and columns of a window.
        shift: How far the image is rolled back.
        bias_table: (entries, H), the bias by relative position, or None.
        logit_scale: (H,), the factor of cosine attention, or None.
        grid: Whether a window's tokens lie as far apart as there are windows.
        roll_padded: Whether the image is padded before it is rolled.
        mask_value: Added to the scores of tokens that the roll brought together.
    """

    image: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    bias_table: Tensor | None = None
    logit_scale: Tensor | None = None
    grid: bool = False
    roll_padded: bool = False
    mask_value: int = -100


class Relative(NamedTuple):
    """Attention over a whole image with a bias by relative position (:func:`ops.relative_attention`).

    Attributes:
        image: Y and X, the rows and columns of its tokens.
        bias_table: (entries, H); three entries more with prefix tokens.
        num_prefix_tokens: Tokens before the image's.
    """

    image: tuple[int, int]
    bias_table: Tensor
    num_prefix_tokens: int = 0


class Decomposed(NamedTuple):
    """Attention with decomposed relative positions over an image, or in its windows
    (:func:`ops.decomposed_attention`); padded as :class:`Windows`.

    Attributes:
        image: Y and X.
        rel_pos_h, rel_pos_w: The tables along both axes.
        size: Rows and columns of a window; None is the whole image.
    """

    image: tuple[int, int]
    rel_pos_h: Tensor
    rel_pos_w: Tensor
    size: tuple[int, int] | None = None


class Attention(NamedTuple):
    """Self-attention.

    Attributes:
        qkv: The packed projection, or three: queries, keys, values. Keys and values may have fewer heads. For
            :func:`fused.cross_attention` three, or two: queries, and keys and values packed.
        proj: The output projection; None if the caller has it.
        num_heads: The number of heads; of this process, if the layers are sharded.
        q_norm, k_norm: Norms of each head's queries and keys.
        norm: Norm in front of ``proj``.
        gate: Module whose sigmoid multiplies what enters ``proj``; it is called.
        attn_drop, proj_drop: Dropout probability of the weights and of the output in the present mode.
        num_prefix_tokens: Tokens in front that RoPE does not rotate.
        fp8: Whether its products run in FP8.
        positions: Windows or relative positions; ``qkv`` is then packed, without norms of queries and keys.
        head_first: Whether a packed ``qkv`` gives each head's query, key and value side by side.
    """

    qkv: Linear | tuple[Linear, ...]
    proj: Linear | None
    num_heads: int
    head_dim: int
    scale: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm: Norm | None = None
    gate: nn.Module | None = None
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    num_prefix_tokens: int = 0
    fp8: bool = False
    positions: Windows | Relative | Decomposed | None = None
    head_first: bool = False


class Mlp(NamedTuple):
    """``drop2(fc2(norm(drop1(act(fc1(x))))))``, or gated: ``act(gate) · value`` in place of ``act(fc1(x))``.

    Attributes:
        fc1: The first layer. If gated: gate and value packed, or two layers, the gate's first.
        activation: The ops' name of the activation.
        input_norm: Norm in front of the first layer.
        drop1, drop2: Dropout probabilities in the present mode.
        gated: Whether it is a gated MLP.
        gate_last: Whether the gate's features come last in a packed ``fc1``.
        fp8: Whether its products run in FP8.
    """

    fc1: Linear | tuple[Linear, Linear]
    fc2: Linear
    activation: str | None
    norm: Norm | None = None
    input_norm: Norm | None = None
    drop1: float = 0.0
    drop2: float = 0.0
    gated: bool = False
    gate_last: bool = False
    fp8: bool = False


class DropPath(NamedTuple):
    """Stochastic depth that drops something in the present mode; None in place of a record drops nothing."""

    drop_prob: float
    scale_by_keep: bool = True


class Block(NamedTuple):
    """A Transformer block; ``gamma1`` and ``gamma2`` are its LayerScales (C,), or None.

    With ``fp8`` all of its products run in FP8. ``shares_tokens`` is the block's mark of :mod:`sharded` if it runs with
    sequence parallelism. A record of what is behind the attention has no ``norm1`` and ``attn``.
    """

    norm1: Norm | None
    attn: Attention | None
    norm2: Norm | None
    mlp: Mlp
    gamma1: Tensor | None = None
    gamma2: Tensor | None = None
    drop_path1: DropPath | None = None
    drop_path2: DropPath | None = None
    fp8: bool = False
    shares_tokens: str | None = None


def linears(record: Block | Attention | Mlp) -> list[Linear]:
    """Return the linear layers of ``record``."""
    if isinstance(record, Block):
        return linears(record.attn) + linears(record.mlp)
    layers = (record.qkv, record.proj) if isinstance(record, Attention) else (record.fc1, record.fc2)
    return [layer for some in layers for layer in ([some] if isinstance(some, Linear) else some or ())]


PRECISION = "_vitkernels_precision"  # the attribute of a module that accelerate() gave a precision


def runs_fp8(module: nn.Module) -> bool:
    """Tell whether the products of ``module`` run in FP8."""
    return module.__dict__.get(PRECISION) == "fp8"


_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}


def activation_name(act: nn.Module) -> str | None:
    """Return the ops' name for the activation module ``act``, or None if they do not support it."""
    cls = type(act)
    if cls is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    if cls is nn.SiLU:
        return "silu"
    # Compare other libraries' classes by name, so that nothing imports these libraries.
    return _ACTIVATIONS.get(cls.__name__) if cls.__module__.startswith(("timm.", "vitkernels.", "open_clip.")) else None


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter of ``module``; a replica of ``nn.DataParallel`` has tensors as attributes instead."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def linear(module: nn.Module) -> Linear:
    """Read a Linear, or PEFT's around one that :func:`vitkernels.layers._lora.why_not` has passed."""
    base = module._modules.get("base_layer")
    if base is None:
        if sharded.MARK in module.__dict__:
            weight, bias, group = sharded.read(module)
            return Linear(weight, bias, group=group)
        return Linear(parameter(module, "weight"), parameter(module, "bias"))
    return linear(base)._replace(lora=_lora(module))


def _lora(module: nn.Module) -> Lora | None:
    """Read PEFT's active adapters as one; None if they add nothing: disabled, merged, or of other layers alone."""
    children, scaling = module._modules, module.scaling
    downs, ups = children["lora_A"]._modules, children["lora_B"]._modules
    names = active_adapters(module)
    if not names:
        return None
    a = [parameter(downs[name], "weight") for name in names]
    b = [parameter(ups[name], "weight") for name in names]
    b = [_scaled(up, scaling[name]) for name, up in zip(names, b, strict=True)]
    if len(names) > 1:  # dropout would draw for each of them
        return Lora(torch.cat(a), torch.cat(b, dim=1))
    drop = children["lora_dropout"]._modules[names[0]]
    return Lora(a[0], b[0], 0.0 if isinstance(drop, nn.Identity) else dropout(drop))


def _scaled(up: Tensor, scale: float | Tensor) -> Tensor:
    """Return ``up * scale``. A tensor, which PEFT makes of it for ``torch.compile``, is not read: that would wait."""
    return up if not isinstance(scale, Tensor) and scale == 1 else up * scale


def active_adapters(module: nn.Module) -> list[str]:
    """Return which adapters of PEFT's layer ``module`` add something to its base layer's output."""
    if module.disable_adapters or module.merged:
        return []
    downs = module._modules["lora_A"]._modules
    return [name for name in module.active_adapters if name in downs]


def norm(module: nn.Module | None) -> Norm | None:
    """Read an ``nn.LayerNorm``, an ``nn.Identity``, or else an RMSNorm."""
    if module is None or isinstance(module, nn.Identity):
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm(parameter(module, "weight"), parameter(module, "bias"), module.eps)
    return Norm(parameter(module, "weight"), None, module.eps, rms=True)


def dropout(module: nn.Module | None) -> float:
    """Return the probability with which an ``nn.Dropout`` drops in its mode."""
    return module.p if module is not None and module.training else 0.0


def drop_path(module: nn.Module) -> DropPath | None:
    """Read a DropPath, or an ``nn.Identity`` in its place."""
    if isinstance(module, nn.Identity) or not module.training or not module.drop_prob > 0.0:
        return None
    return DropPath(module.drop_prob, module.scale_by_keep)


def layer_scale(module: nn.Module) -> Tensor | None:
    """Return the ``gamma`` of a LayerScale, or None for an ``nn.Identity`` in its place."""
    return None if isinstance(module, nn.Identity) else parameter(module, "gamma")


_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("q", "kv"))  # timm's names of several projections


def attention(module: nn.Module) -> Attention:
    """Read timm's attentions: ``qkv`` (or one of ``_SEPARATE``) and ``proj``, with what they may add.

    With ``fused_attn``, timm calls PyTorch's attention, which scales by 1/√D whatever ``scale`` is, and takes the mode
    of the attention, not of its dropout module.
    """
    children, own, heads = module._modules, module.__dict__, module.num_heads
    packed, drop = children.get("qkv"), children.get("attn_drop")
    if packed is None:
        qkv = tuple(linear(children[name]) for name in next(n for n in _SEPARATE if children.keys() >= set(n)))
        rows, group = qkv[0].weight.shape[0], qkv[0].group
    else:
        qkv = linear(packed)
        rows, group = qkv.weight.shape[0] // 3, qkv.group
    if group is not None:
        heads //= group.size
    if packed is not None and module._parameters.get("q_bias") is not None:
        biases = (module.q_bias, module.k_bias, module.v_bias)  # EVA's three parts; that of the keys is zero
        if group is not None:
            biases = [group.own_heads(bias, -1) for bias in biases]
        qkv = qkv._replace(bias=torch.cat(biases))
    calls_torch = own.get("fused_attn", False)
    return Attention(
        qkv,
        linear(children["proj"]),
        heads,
        rows // heads,
        None if calls_torch else own.get("scale"),
        norm(children.get("q_norm")),
        norm(children.get("k_norm")),
        norm(children.get("norm")),
        children.get("gate"),
        0.0 if drop is None or not (module if calls_torch else drop).training else drop.p,
        dropout(children.get("proj_drop")),
        own.get("num_prefix_tokens", 0),
    )


def mlp(module: nn.Module) -> Mlp:
    """Read timm's MLPs: ``fc1`` (or ``fc1_g`` and ``fc1_x``) and ``fc2``, or ViTamin's ``w0``, ``w1`` and ``w2``."""
    children = module._modules
    last, sub_norm, input_norm, gated = "fc2", children.get("norm"), None, "gate_last" in module.__dict__
    if "fc1" in children:
        first = linear(children["fc1"])
    else:
        names = ("fc1_g", "fc1_x")
        if "w0" in children:
            names, last, sub_norm, input_norm = ("w0", "w1"), "w2", None, sub_norm
        gated, first = True, (linear(children[names[0]]), linear(children[names[1]]))
    return Mlp(
        first,
        linear(children[last]),
        activation_name(children["act"]),
        norm(sub_norm),
        norm(input_norm),
        dropout(children["drop1"]),
        dropout(children["drop2"]),
        gated,
        module.__dict__.get("gate_last", False),
    )


def block(module: nn.Module) -> Block:
    """Read timm's blocks."""
    children = module._modules
    behind = behind_attention(module, mlp(children["mlp"]))
    return behind._replace(
        norm1=norm(children["norm1"]),
        attn=attention(children["attn"]),
        shares_tokens=module.__dict__.get(sharded.MARK),
    )


def behind_attention(module: nn.Module, mlp: Mlp) -> Block:
    """Read what is behind the attention of timm's blocks.

    LayerScales are ``ls1`` and ``ls2`` in its ViT, ``gamma_1`` and ``gamma_2`` in its EVA.
    """
    children = module._modules
    if "ls1" in children:
        gamma1, gamma2 = layer_scale(children["ls1"]), layer_scale(children["ls2"])
    else:
        gamma1, gamma2 = module._parameters.get("gamma_1"), module._parameters.get("gamma_2")
    return Block(
        None,
        None,
        norm(children["norm2"]),
        mlp,
        gamma1,
        gamma2,
        drop_path(children["drop_path1"]),
        drop_path(children["drop_path2"]),
        runs_fp8(module),
    )
