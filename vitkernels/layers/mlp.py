"""The MLP of a Transformer block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vitkernels.layers import fused, records
from vitkernels.layers._plain import has_plain_children
from vitkernels.layers.activation import QuickGELU, create_activation
from vitkernels.layers.layer_norm import LayerNorm

_CHILDREN = {
    "fc1": (nn.Linear,),
    "act": (nn.GELU, nn.SiLU, QuickGELU),
    "drop1": (nn.Dropout,),
    "norm": (nn.Identity, nn.LayerNorm, LayerNorm),
    "fc2": (nn.Linear,),
    "drop2": (nn.Dropout,),
}


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))`` in one op, with optional dropout after the activation and after ``fc2``.

    Args:
        in_features: Channels of the input.
        hidden_features: Features between the two layers; ``in_features`` unless given.
        out_features: Channels of the output; ``in_features`` unless given.
        act_layer: As for :func:`vitkernels.layers.create_activation`.
        bias: Whether ``fc1`` and ``fc2`` have biases.
        drop: Dropout rate after the activation and after ``fc2``.
        norm_layer: Callable that makes a norm of the hidden features (LayerNorm in BEiT-3), or None.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: str | Callable[[], nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        *,
        norm_layer: Callable[..., nn.Module] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, device=device, dtype=dtype)
        self.act = create_activation(act_layer)
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden_features, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def fuses(self) -> bool:
        """Tell whether the fused forward may run: it would skip a hook or an adapter other than LoRA on a child."""
        return has_plain_children(self, _CHILDREN)

    def forward(self, x: Tensor) -> Tensor:
        if Mlp.fuses(self):  # by its class: the hub's layer runs this on other libraries' modules (tools/hub)
            return fused.mlp(records.mlp(self), x)
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
