"""Attention maps of any model that uses PyTorch's attention functions, computed on demand during one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitkernels import ops, runtime


def attention_maps(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    query: int | None = None,
    modules: Callable[[str], bool] | None = None,
) -> dict[str, Tensor]:
    """Run ``model`` once and return the attention weights of each attention call.

    During this call, the fused modules of an accelerated model run their original forward, whose queries and keys
    already have norms and rotary positions applied. The model keeps its mode (train or eval) and masks, and is not
    changed.

    Args:
        model: Accelerated or not; of timm, transformers, torchvision, or any that calls
            ``scaled_dot_product_attention`` or ``nn.MultiheadAttention``.
        inputs: Inputs of the model: images, a sequence of positional arguments, or a mapping of keyword arguments.
        query: Index of a query; only its row is computed. 0 is the class token, −1 the last token. None: all rows.
        modules: Selects modules to keep by their dotted name; all if None.

    Returns:
        Maps by the dotted name of the attention module, in the order of the calls: (B, H, N_q, N_kv), or
        (B, H, 1, N_kv) for one query, in fp32 (fp64 for fp64), before any dropout. Further calls of a module get a
        number after the name: ``blocks.0.attn#2``.

    Raises:
        RuntimeError: No attention call was seen, because the model computes its own softmax. timm does so with
            ``TIMM_FUSED_ATTN=0``, transformers with ``attn_implementation="eager"``.
        IndexError: There is no such query.
    """
    watch = _Watch(query, modules or (lambda name: True))
    hooks = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout):  # a hook on it would make layers.Attention compute its weights
                continue
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: watch.calls.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: watch.calls.pop() and None, always_call=True))
        with torch.no_grad(), runtime.use_backend("torch"), watch:
            if isinstance(inputs, Tensor):
                model(inputs)
            elif isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not watch.seen:
        raise RuntimeError(
            f"no attention was seen in {type(model).__name__}: it calls neither scaled_dot_product_attention nor "
            "nn.MultiheadAttention; in timm unset TIMM_FUSED_ATTN=0, in transformers take attn_implementation='sdpa'"
        )
    return watch.maps


class _Watch(TorchFunctionMode):
    """Records the weights of each attention call."""

    def __init__(self, query: int | None, wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self.query, self.wanted = query, wanted
        self.calls: list[str] = []  # the names of the modules that are running, the innermost last
        self.maps: dict[str, Tensor] = {}
        self.seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            self._keep(lambda: self._weights(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            asked, averaged = kwargs.get("need_weights", True), kwargs.get("average_attn_weights", True)
            output, weights = func(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})
            batched = weights if weights.ndim == 4 else weights.unsqueeze(0)
            rows = slice(None) if self.query is None else [self.query]
            self._keep(lambda: batched[:, :, rows].to(runtime.wide_dtype(batched.dtype)))
            return output, (weights.mean(-3) if averaged else weights) if asked else None
        return func(*args, **kwargs)

    def _keep(self, weights: Callable[[], Tensor]) -> None:
        self.seen = True
        name = self.calls[-1] if self.calls else ""
        if not self.wanted(name):
            return
        again = sum(key.partition("#")[0] == name for key in self.maps)
        self.maps[f"{name}#{again + 1}" if again else name] = weights()

    def _weights(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> Tensor:
        if enable_gqa:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return ops.attention_weights(
            query, key, query=self.query, attn_mask=attn_mask, is_causal=is_causal, scale=scale
        )
