"""The gated MLPs of DINOv2, DINOv3, EVA02 and AIMv2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.layers._plain import has_plain_children
from vitkernels.layers.activation import QuickGELU, create_activation
from vitkernels.layers.layer_norm import LayerNorm

_CHILDREN = {
    "act": (nn.GELU, nn.SiLU, QuickGELU),
    "drop1": (nn.Dropout,),
    "norm": (nn.Identity, nn.LayerNorm, LayerNorm),
    "fc2": (nn.Linear,),
    "drop2": (nn.Dropout,),
}


class _GatedMlp(nn.Module):
    """Shared part of both classes; the ``nn.Linear`` children of the first layer are named in ``_FIRST``."""

    _FIRST: tuple[str, ...]

    def __init__(
        self, in_features, first_features, hidden, out_features, act_layer, norm_layer, bias, drop, **kwargs
    ) -> None:
        super().__init__()
        for name in self._FIRST:
            self.add_module(name, nn.Linear(in_features, first_features, bias=bias, **kwargs))
        self.act = create_activation(act_layer)
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden, **kwargs)
        self.fc2 = nn.Linear(hidden, out_features, bias=bias, **kwargs)
        self.drop2 = nn.Dropout(drop)

    def fuses(self) -> bool:
        """Tell whether the fused forward may run: it would skip an adapter or a hook on a child."""
        return has_plain_children(self, dict.fromkeys(self._FIRST, (nn.Linear,)) | _CHILDREN)

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.training and (self.drop1.p or self.drop2.p)
        if self.fuses() and not dropped:
            return fused.mlp(records.mlp(self), x)
        gate, value = self._gate_and_value(x)
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(gate) * value))))

    def _gate_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class SwiGLU(_GatedMlp):
    """``fc2(norm(act(fc1_g(x)) · fc1_x(x)))`` in one op (arXiv 2002.05202).

    Args:
        in_features: Channels of the input.
        hidden_features: Features between the layers; ``in_features`` unless given.
        out_features: Channels of the output; ``in_features`` unless given.
        act_layer: As for :func:`vitkernels.layers.create_activation`.
        norm_layer: Callable that makes the norm of the hidden features (LayerNorm in EVA02), or None.
        bias: Whether the linear layers have biases.
        drop: Dropout rate after the gate and after ``fc2``; while dropout is active, the layers run as separate ops.
        align_to: Round ``hidden_features`` up to a multiple of this, if not 0.
    """

    _FIRST = ("fc1_g", "fc1_x")

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: str | Callable[[], nn.Module] = "silu",
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        align_to: int = 0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        hidden = hidden_features or in_features
        if align_to:
            hidden += -hidden % align_to
        dd = {"device": device, "dtype": dtype}
        out_features = out_features or in_features
        super().__init__(in_features, hidden, hidden, out_features, act_layer, norm_layer, bias, drop, **dd)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Begin with a constant gate, as timm's ViT does."""
        nn.init.normal_(self.fc1_g.weight, std=1e-6)
        if self.fc1_g.bias is not None:
            nn.init.ones_(self.fc1_g.bias)

    def _gate_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc1_g(x), self.fc1_x(x)


class SwiGLUPacked(_GatedMlp):
    """:class:`SwiGLU` with one packed layer ``fc1``, the gate's features first (DINOv2, arXiv 2304.07193).

    Args:
        in_features: Channels of the input.
        hidden_features: Output features of ``fc1``, twice the input features of ``fc2``; ``in_features`` unless given.
        gate_last: Whether the gate's features come last.
        out_features, act_layer, norm_layer, bias, drop: As for :class:`SwiGLU`.

    Raises:
        ValueError: ``hidden_features`` is odd.
    """

    _FIRST = ("fc1",)

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: str | Callable[[], nn.Module] = "silu",
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        *,
        gate_last: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        hidden = hidden_features or in_features
        if hidden % 2:
            raise ValueError(f"hidden_features is {hidden}; expected an even number, gate and value")
        dd = {"device": device, "dtype": dtype}
        out_features = out_features or in_features
        super().__init__(in_features, hidden, hidden // 2, out_features, act_layer, norm_layer, bias, drop, **dd)
        self.gate_last = gate_last

    @torch.no_grad()
    def init_weights(self) -> None:
        """Begin with a constant second half, as timm's ViT does."""
        half = self.fc1.out_features // 2
        nn.init.normal_(self.fc1.weight[half:], std=1e-6)
        if self.fc1.bias is not None:
            nn.init.ones_(self.fc1.bias[half:])

    def _gate_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.fc1(x).chunk(2, dim=-1)
        return (second, first) if self.gate_last else (first, second)
