"""Estimate the share of a model's time that its swapped modules take, from what PyTorch's ops compute and move.

A copy on the meta device, without data, classifies one image in evaluation mode. The time of an op is the longer of
two: that of its floating-point operations (``torch.utils.flop_counter``) at ``FLOPS_PER_BYTE``, and that of moving its
inputs and outputs at two bytes an element. PyTorch's own attention counts as one op that never writes its weights.
Views, allocations and launches take no time. The estimate is of the model before the swap, not of what the swap saves.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from vitkernels import ops, runtime
from vitkernels._intercept import Access, Intercept, accesses, op_accesses
from vitkernels.swap import _rules

FLOPS_PER_BYTE = 200  # fp16 and bf16 on an A100 (156) to an H100 (295), by their data sheets


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention calls of one shape within the swapped modules.

    A model may be moved later, so the providers for a GPU and for a CPU are both given.

    Attributes:
        queries, keys: The number of tokens.
        head_dim: Channels per head.
        calls: The number of calls.
        provider: The attention provider on a GPU (the model's, else the current one): ``triton``, our kernels, or
            PyTorch if the tuning table or the backend selects it (see ``ops.attention_provider``): ``sdpa``, its fused
            attention, or ``eager``, the model's own products and softmax.
        on_cpu: The attention provider on a CPU: ``sdpa`` or ``eager`` as in the model's own forward; ``triton`` if the
            CPU emulates a GPU; ``none`` if the backend asks for kernels that cannot run there: the call then raises.
    """

    queries: int
    keys: int
    head_dim: int
    calls: int
    provider: str
    on_cpu: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimate for a model.

    Attributes:
        image: Channels, height and width of the image that is classified.
        fused_share: The share of the estimated time of one image that the swapped modules take, 0 to 1.
        attention: Each shape of attention in the swapped modules.
    """

    image: tuple[int, int, int]
    fused_share: float
    attention: tuple[Attention, ...]

    def __str__(self) -> str:
        image = "×".join(map(str, self.image))
        text = f"about {100 * self.fused_share:.0f} % of the time of a {image} image lies in what is swapped"
        for a in self.attention:
            tokens = a.queries if a.queries == a.keys else f"{a.queries} on {a.keys}"
            who = a.provider if a.provider == a.on_cpu else f"{a.provider} on a GPU, {a.on_cpu} on a CPU"
            text += f"\nattention of {tokens} tokens, head dim {a.head_dim}, ×{a.calls}: {who}"
        return text


def estimate_time(model: nn.Module, swapped: Mapping[str, object]) -> Estimate | None:
    """Return the estimate for ``model`` whose modules at the paths ``swapped`` are swapped, or None.

    For a pair of towers (CLIP, SigLIP) only the vision tower runs. The result is None if the size of the model's
    images is unknown (it is known for timm, torchvision, transformers and open_clip), or if it cannot run without data.
    """
    children = dict(model.named_children())
    towers = {"": model} | {path: children[path] for path in _TOWERS if path in children}
    tower = next((path for path, module in towers.items() if image_size(module) is not None), None)
    if tower is None:
        return None
    image = image_size(towers[tower])
    first = next(model.parameters(), None)
    dtype = torch.float32 if first is None else first.dtype
    try:
        skeleton = without_data(model)
        counter = _Counter(skeleton, swapped)
        # Only in inference mode does a dispatch mode see PyTorch's attention as a single op.
        with torch.inference_mode(), runtime.use_backend("torch"), counter:
            skeleton.get_submodule(tower)(torch.empty(1, *image, device="meta", dtype=dtype))
    except Exception:  # a user's model may raise anything without data: then there is no estimate
        return None
    if not counter.total:
        return None
    attention = tuple(
        Attention(*shape, calls, _on_gpu(shape, own, dtype, first), _on_cpu(own))
        for (*shape, own), calls in counter.attention.items()
    )
    return Estimate(image, counter.fused / counter.total, attention)


_TOWERS = ("visual", "vision_model")  # open_clip's and transformers'


def image_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Return channels, height and width of the images that ``model`` takes, or None if unknown."""
    config = getattr(model, "config", None)
    known = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, None, None))
    sizes = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),  # as built; pretrained_cfg may differ
        getattr(model, "image_size", None),
        getattr(config, "image_size", None),
        known[1:],
    )
    size = next(size for size in sizes if size is not None)
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(model, "in_chans", None) or getattr(config, "num_channels", None) or known[0]
    return None if height is None else (channels, height, width)


def without_data(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` on the meta device, in evaluation mode, without its hooks."""
    memo: dict[int, object] = {id(p): nn.Parameter(_meta(p), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): _meta(b) for b in model.buffers()}
    skeleton = copy.deepcopy(model, memo).eval()
    for module in skeleton.modules():  # the estimate must not run a user's hooks
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return skeleton


def _meta(t: Tensor) -> Tensor:
    return torch.empty_like(t, device="meta")


def _on_gpu(shape: Sequence[int], own: str, dtype: torch.dtype, first: Tensor | None) -> str:
    if runtime.backend() == "torch":
        return own
    if first is not None and first.device.type in ("cuda", "xpu"):
        device = first.device
    else:
        device = torch.device(next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), "meta"))
    return ops.attention_provider(*shape, dtype, device)


def _on_cpu(own: str) -> str:
    try:
        return "triton" if ops.uses_kernels(torch.empty(0)) else own  # a module on a CPU runs its own forward
    except RuntimeError:
        return "none"


class _Counter(Intercept):
    """Adds up the time of all ops, and of the ops within swapped modules."""

    def __init__(self, model: nn.Module, swapped: Mapping[str, object]) -> None:
        # PyTorch's decomposition of upsampling is not what runs.
        super().__init__(self._run, self._count, lambda op: "upsample" not in op.overloadpacket.__name__)
        self.total = self.fused = 0.0
        self.attention: Counter[tuple[int, int, int, str]] = Counter()  # queries, keys, head dim, PyTorch's provider
        self._within = [False]  # for each running module, outermost first: whether a fused forward covers it
        self._weights: tuple[int, int] | None = None  # queries and keys of the last softmax
        paths = {module: path for path, module in model.named_modules()}
        covers: dict[nn.Module, bool] = {}
        for module, path in paths.items():
            parent = model.get_submodule(path.rpartition(".")[0]) if path else None
            covers[module] = path in swapped or (covers.get(parent, False) and not _calls(parent, path))
            module.register_forward_pre_hook(lambda *_, inside=covers[module]: self._within.append(inside))
            module.register_forward_hook(lambda *_: self._leave())

    def _leave(self) -> None:
        self._within.pop()

    def _run(self, op, args, kwargs):
        if op is torch.ops.aten.scaled_dot_product_attention.default:
            return self._attend(*args[:3])
        if op is torch.ops.aten.dropout.default and not args[2]:
            return args[0]
        return NotImplemented

    def _count(self, op, args, kwargs, out) -> None:
        if moved := op_accesses(op, args, kwargs, out):
            formula = flop_registry.get(op.overloadpacket)
            self._add(0 if formula is None else formula(*args, **kwargs, out_val=out), moved)
        if op is torch.ops.aten._softmax.default and args[0].ndim > 2:
            self._weights = tuple(out.shape[-2:])
        elif op is torch.ops.aten.bmm.default and tuple(args[0].shape[-2:]) == self._weights:
            self._note(*self._weights, args[1].shape[-1], "eager")
            self._weights = None

    def _add(self, flops: float, moved: list[Access]) -> None:
        time = max(flops / FLOPS_PER_BYTE, 2 * sum(access.elements for access in moved))
        self.total += time
        self.fused += time * self._within[-1]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Count attention on (..., N, D) as one op, and return its output."""
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        flops = 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        self._add(flops, accesses((q, k, v), (out,)))
        self._note(q.shape[-2], k.shape[-2], q.shape[-1], "sdpa")
        return out

    def _note(self, queries: int, keys: int, head_dim: int, own: str) -> None:
        if self._within[-1]:
            self.attention[queries, keys, head_dim, own] += 1


def _calls(parent: nn.Module, path: str) -> bool:
    """Tell whether ``parent`` has a fused forward that still calls the child at ``path``."""
    rule = _rules.RULES.get(type(parent))
    return rule is not None and path.rpartition(".")[2] in rule.called
