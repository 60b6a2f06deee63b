"""Activations by their name in the ops and in timm."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vitkernels import reference
from vitkernels.layers import records


class QuickGELU(nn.Module):
    """``x · σ(1.702 x)``, the activation of OpenAI's CLIP (arXiv 1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.activate(x, "quick_gelu")


_BY_NAME: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
}


def create_activation(act_layer: str | Callable[[], nn.Module] | None) -> nn.Module:
    """Return the ``nn.GELU``, ``nn.SiLU`` or :class:`QuickGELU` that ``act_layer`` means.

    Args:
        act_layer: ``"gelu"`` (erf), ``"gelu_tanh"``, ``"quick_gelu"`` or ``"silu"``; a class or other callable that
            makes an equivalent module (``nn.GELU``, timm's ``QuickGELU``, …); None for ``"gelu"``.

    Raises:
        ValueError: The name is none of these.
        NotImplementedError: The callable makes a module that the ops do not support.
    """
    if act_layer is None:
        act_layer = "gelu"
    if isinstance(act_layer, str):
        if act_layer not in _BY_NAME:
            raise ValueError(f"unknown act_layer {act_layer!r}; expected one of {', '.join(_BY_NAME)}")
        return _BY_NAME[act_layer]()
    act = act_layer()
    name = records.activation_name(act)
    if name is None:
        raise NotImplementedError(f"act_layer makes {act!r}; expected the meaning of one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]()
