"""timm's Vision Transformers, those in windows too: plain, compiled, under a CUDA graph, and accelerated.

``inference`` is a forward without gradients; ``training`` is a forward, the backward of the cross-entropy and a step of
AdamW. Every provider has the same weights. In ``amp`` the weights are fp32 and the forward runs under bf16 autocast; in
other dtypes weights, images and optimizer state have that dtype.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitkernels
from benchmarks.compete import Contender, Entry, Session, compete
from benchmarks.environment import Missing
from benchmarks.judge import judge_model
from benchmarks.schema import Row
from vitkernels.runtime import wide_dtype
from vitkernels.testing.cases import DTYPES
from vitkernels.tools import names
from vitkernels.tools.console import import_timm

CHECKED_IMAGES = 8  # most images whose results are judged: fp64 takes memory
GRAPH_BATCH = 8  # larger batches keep the device busy without a graph
# Providers that compile: torch.compile's mode, and its approximate seconds.
COMPILED = {
    "compile": (None, 40.0),
    "compile reduce-overhead": ("reduce-overhead", 45.0),
    "compile max-autotune": ("max-autotune-no-cudagraphs", 120.0),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """timm's name of a model, and the image size if it is not the model's default."""

    name: str
    image: int | None = None

    @property
    def case(self) -> str:
        return "" if self.image is None else f"{self.image} px"


MODELS = (
    Model("vit_base_patch16_224"),
    Model("vit_large_patch16_224"),
    Model("vit_large_patch14_dinov2", 518),
    Model("vit_so400m_patch14_siglip_384"),
    Model("deit3_base_patch16_224"),
    Model("vit_small_patch16_224"),
    Model("vit_tiny_patch16_224"),
    Model("vit_base_patch14_dinov2", 224),
    Model("vit_base_patch14_dinov2", 518),
    Model("vit_large_patch14_dinov2", 224),
    Model("vit_large_patch16_dinov3"),
    Model("vit_large_patch14_clip_336"),
    Model("vit_giant_patch14_dinov2", 224),
    Model("vit_giant_patch14_dinov2", 518),
    Model("swin_tiny_patch4_window7_224"),
    Model("swin_base_patch4_window7_224"),
    Model("swinv2_base_window8_256"),
    Model("beit_base_patch16_224"),
    Model("maxvit_tiny_tf_224"),
    Model("samvit_base_patch16"),
)


def build(model: Model, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Return the network with random weights, so that no download is needed."""
    options = {} if model.image is None else {"img_size": model.image}
    with torch.device(device):
        return names.build(model.name, num_classes=1000, **options)[0].to(dtype)


@functools.cache
def forward_flops(model: Model) -> int:
    """Return the FLOPs of a forward of one image, by PyTorch's formulas for products and attention."""
    # The counter's hooks on tensors that require grad fail for a pooling query, which has no grad_fn: let none require.
    network = build(model, torch.float32, "meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, *image_size(model, network), device="meta"))
    return counter.get_total_flops()


def image_size(model: Model, network: nn.Module) -> tuple[int, int]:
    if model.image is not None:
        return model.image, model.image
    return tuple(import_timm().data.resolve_model_data_config(network)["input_size"][1:])


def flops(model: Model, mode: str, batch: int) -> int:
    """Return the FLOPs of all products; backward has two products for each of forward's."""
    return forward_flops(model) * batch * (3 if mode == "training" else 1)


def least_bytes(network: nn.Module, mode: str, images: Tensor) -> int:
    """Return the minimum bytes: images and weights; in training also gradients, and the optimizer's update."""
    weights = sum(p.nbytes for p in network.parameters())
    # Training: forward and backward read the weights (2), gradients are written and read (2), and the optimizer reads
    # and writes weights and two moments (6).
    return images.nbytes + weights * (10 if mode == "training" else 1)


def measure_model(
    session: Session, model: Model, batch: int, dtype: str, mode: str, *, seconds: float = 2.0
) -> list[Row]:
    """Measure ``model`` at ``batch``, for about ``seconds`` per provider.

    Raises:
        UserError: timm cannot be imported.
    """
    torch.compiler.reset()
    weights_dtype = torch.float32 if dtype == "amp" else DTYPES[dtype]
    plain = build(model, weights_dtype, session.device).train(mode == "training")
    images = torch.randn(batch, 3, *image_size(model, plain), device=session.device).to(weights_dtype)
    labels = torch.randint(1000, (batch,), device=session.device)
    task = Task(plain, images, labels, mode, torch.bfloat16 if dtype == "amp" else None)
    few = dataclasses.replace(task, images=images[:CHECKED_IMAGES], labels=labels[:CHECKED_IMAGES])
    wide = dataclasses.replace(few, images=few.images.double(), autocast_dtype=None)
    contenders = _contenders(task)
    workload = Row(
        "model", model.name, model.case, "", mode, dtype, batch,
        flops=flops(model, mode, batch), bytes=least_bytes(plain, mode, images),
    )  # fmt: skip
    return compete(
        session,
        workload,
        contenders,
        truth=wide.results(copy.deepcopy(plain).double()),
        yardstick=few.results(plain),
        judge=judge_model,
        seconds=seconds,
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """A network's workload: the plain model, images, labels, mode and autocast dtype."""

    plain: nn.Module
    images: Tensor
    labels: Tensor
    mode: str
    autocast_dtype: torch.dtype | None

    @property
    def on_gpu(self) -> bool:
        return self.images.is_cuda

    @functools.cached_property
    def accelerated(self) -> nn.Module:
        network = copy.deepcopy(self.plain)
        vitkernels.accelerate(network)
        return network

    def forward(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        autocast = self.autocast_dtype is not None
        with (
            torch.set_grad_enabled(self.mode == "training"),
            torch.autocast(self.images.device.type, self.autocast_dtype, enabled=autocast),
        ):
            return network(self.images)

    def results(self, network: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the output for the first images, and in training the gradients of their loss, by name.

        The whole batch runs, as when it is timed. Images are independent, and the loss ignores labels of -100.
        """
        output = self.forward(network)
        results = {"output": output[:CHECKED_IMAGES].detach().clone()}
        if self.mode == "training":
            labels = self.labels.clone()
            labels[CHECKED_IMAGES:] = -100
            owner = getattr(network, "_orig_mod", network)  # a compiled network wraps its module
            names, parameters = zip(*owner.named_parameters(), strict=True)
            grads = torch.autograd.grad(_loss(output, labels), parameters, allow_unused=True)
            results |= {f"d{n}": g.clone() for n, g in zip(names, grads, strict=True) if g is not None}
        return results

    def train(self, network: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> None:
        _loss(self.forward(network), self.labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def _loss(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.to(wide_dtype(output.dtype)), labels)


def _contenders(task: Task) -> dict[str, Contender]:
    def ours(wrap=None):
        return _entry(task, task.accelerated, wrap)

    def timm(wrap=None, backends=(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)):
        # Flash attention does not support everything (fp32, for example): then PyTorch takes the next backend.
        chosen = sdpa_kernel(list(backends), set_priority=True) if task.on_gpu else contextlib.nullcontext()
        with chosen:
            entry = _entry(task, task.plain, wrap)

        def function():
            with sdpa_kernel(list(backends), set_priority=True):
                entry.function()

        return dataclasses.replace(entry, function=function) if task.on_gpu else entry

    def gpu_only(build: Callable[[], Entry]) -> Callable[[], Entry]:
        def guarded():
            if not task.on_gpu:
                raise Missing("a CPU run compares with the plain model alone")
            return build()

        return guarded

    def compiled(build, mode: str | None, seconds: float) -> Contender:
        wrap = functools.partial(torch.compile, dynamic=False, mode=mode)

        def build_it():
            entry = build(wrap)
            # A replay does not show the memory that its graph holds.
            return dataclasses.replace(entry, peak_bytes=None) if mode == "reduce-overhead" else entry

        return Contender(gpu_only(build_it), seconds if task.on_gpu else 0.0)

    contenders = {"vitkernels": Contender(ours), "timm": Contender(timm)}
    if task.mode == "inference" and len(task.images) <= GRAPH_BATCH:
        contenders["vitkernels graph"] = Contender(gpu_only(functools.partial(_graph_entry, task, task.accelerated)))
        contenders["vitkernels compile_inference"] = Contender(
            gpu_only(lambda: _entry(task, task.accelerated, vitkernels.compile_inference))
        )
        contenders["timm graph"] = Contender(gpu_only(functools.partial(_graph_entry, task, task.plain)))
    contenders["timm cudnn"] = Contender(gpu_only(functools.partial(timm, backends=(SDPBackend.CUDNN_ATTENTION,))))
    contenders |= {
        provider: compiled(functools.partial(_entry, task, task.plain), *how) for provider, how in COMPILED.items()
    }
    contenders["vitkernels compiled"] = compiled(ours, *COMPILED["compile"])
    contenders["compile max-autotune"] = contenders.pop("compile max-autotune")  # last: it takes longest to build
    return contenders


def _entry(task: Task, owner: nn.Module, wrap: Callable[[nn.Module], Callable] | None) -> Entry:
    if task.mode == "training":
        owner = copy.deepcopy(owner)  # the optimizer's steps would change the shared weights
    network = owner if wrap is None else wrap(owner)
    results = task.results(network)
    held = sum(t.nbytes for t in [*owner.parameters(), *owner.buffers()]) + task.images.nbytes
    before = torch.cuda.memory_allocated() if task.on_gpu else 0
    if task.mode == "inference":
        function = functools.partial(task.forward, network)
    else:
        # The learning rate is so small that the weights stay random over thousands of steps, and the work the same.
        optimizer = torch.optim.AdamW(owner.parameters(), lr=1e-7, fused=task.on_gpu)
        function = functools.partial(task.train, network, optimizer)
    function()
    if not task.on_gpu:
        return Entry(function, results)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return Entry(function, results, held + torch.cuda.max_memory_allocated() - before)


def _graph_entry(task: Task, network: nn.Module) -> Entry:
    results = task.results(network)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        task.forward(network)
    return Entry(graph.replay, results)
