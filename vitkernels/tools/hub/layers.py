"""Layers for ``kernels.kernelize``: each replaces the forward of another library's module, whose state it reads.

kernels takes only classes without a constructor and members of their own, and binds their forward to the module. So the
module's class still has the forward that it had. Gradients are computed by kernels too.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from vitkernels import ops
from vitkernels.layers import _own, fused, mlp, records
from vitkernels.layers._plain import has_plain_children
from vitkernels.ops._attention.checks import MAX_HEAD_DIM


class LayerNorm(nn.Module):
    """LayerNorm (arXiv 1607.06450) in place of ``nn.LayerNorm`` over the last dim."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        if not _computes_as_named(self) or len(self.normalized_shape) > 1:
            return type(self).forward(self, input)
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) in place of the norms that transformers calls ``RMSNorm`` on the hub."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _computes_as_named(self):
            return type(self).forward(self, hidden_states)
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))`` in one op, in place of an MLP with the attributes of ``timm.layers.Mlp``.

    As there, dropout and a norm of the hidden features may stand between. What holds a child that a fused forward would
    bypass, such as an adapter or a hook, calls its children.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        if not _computes_as_named(self):
            return type(self).forward(self, x)
        return mlp.Mlp.forward(self, x)


class Attention(nn.Module):
    """Self-attention (arXiv 1706.03762) on the packed projection, in place of ``timm.layers.Attention``.

    Masks, norms of queries and keys, and a gate are supported. What holds anything else than timm's attention does, or
    a child that a fused forward would bypass, runs the forward of its class.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if _computes_as_named(self) and _attention_fuses(self) and fused.takes_masks(attn_mask, is_causal):
            return fused.attention(records.attention(self), x, attn_mask=attn_mask, is_causal=is_causal)
        return type(self).forward(self, x, attn_mask, is_causal)


class Block(nn.Module):
    """A whole pre-norm block (arXiv 2010.11929), in place of ``timm.models.vision_transformer.Block``.

    It is as fused as by ``vitkernels.accelerate``, whether or not its children are mapped too. What holds anything else
    than timm's block does, or a child that a fused forward would bypass, runs the forward of its class.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if _computes_as_named(self) and _block_fuses(self) and fused.takes_masks(attn_mask, is_causal):
            return fused.block(records.block(self), x, attn_mask=attn_mask, is_causal=is_causal)
        return type(self).forward(self, x, attn_mask, is_causal)


_own.alike += [LayerNorm.forward, Mlp.forward, Attention.forward]


def _computes_as_named(module: nn.Module) -> bool:
    """Tell whether ``module`` has the forward of the class that was named to kernels.

    A subclass inherits the name, but may compute something else, as timm's LayerNorm2d in place of PyTorch's LayerNorm.
    """
    cls = type(module)
    named = [base for base in cls.__mro__ if "kernel_layer_name" in vars(base)]
    return not named or cls.forward is named[0].forward


def _attention_fuses(attn: nn.Module) -> bool:
    """Tell whether ``attn`` holds what :func:`records.attention` reads, and nothing that the fused forward skips."""
    norms, drops = (nn.Identity, nn.LayerNorm, *_of_timm("LayerNorm", "RmsNorm")), (nn.Dropout,)
    children = {"qkv": (nn.Linear,), "q_norm": norms, "k_norm": norms, "attn_drop": drops, "norm": norms}
    children |= {"proj": (nn.Linear,), "proj_drop": drops}
    return (
        _holds(attn, children, {"gate"})
        and has_plain_children(attn, children)
        and all(_norms_last_dim(attn._modules[name]) for name in ("q_norm", "k_norm", "norm"))
        and attn.head_dim <= MAX_HEAD_DIM
    )


def _block_fuses(block: nn.Module) -> bool:
    """As :func:`_attention_fuses`, of a block."""
    norms, paths = (nn.LayerNorm, *_of_timm("LayerNorm", "RmsNorm")), (nn.Identity, *_of_timm("DropPath"))
    scales = (nn.Identity, *_of_timm("LayerScale"))
    children = {"norm1": norms, "attn": _of_timm("Attention"), "ls1": scales, "drop_path1": paths}
    children |= {"norm2": norms, "mlp": _of_timm("Mlp"), "ls2": scales, "drop_path2": paths}
    if not (_holds(block, children) and has_plain_children(block, children)):
        return False
    own = block._modules
    norms_last_dim = _norms_last_dim(own["norm1"]) and _norms_last_dim(own["norm2"])
    return norms_last_dim and _attention_fuses(own["attn"]) and mlp.Mlp.fuses(own["mlp"])


def _holds(module: nn.Module, children: dict, optional: set[str] = frozenset()) -> bool:
    """Tell whether ``module`` has these children, and no others and no parameters, which it may use in its forward."""
    return not module._parameters and children.keys() <= module._modules.keys() <= children.keys() | optional


def _norms_last_dim(norm: nn.Module) -> bool:
    """Tell whether the norm is a plain one over the last dim; timm's fast norm rounds differently under autocast."""
    own = norm.__dict__
    return isinstance(norm, nn.Identity) or (len(own["normalized_shape"]) == 1 and not own.get("_fast_norm", False))


def _of_timm(*names: str) -> tuple[type[nn.Module], ...]:
    """Return timm's layers of these names, if timm has been imported."""
    layers = sys.modules.get("timm.layers")
    return () if layers is None else tuple(getattr(layers, name) for name in names)
