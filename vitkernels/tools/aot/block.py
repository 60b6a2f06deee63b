"""One block of a Vision Transformer of timm, or all of Swin's first stage: what it is called with, what it launches.

The block that runs is the model's own, after :func:`vitkernels.accelerate` where it is to be accelerated, so that the
figures follow the code. Its tensors are fake ones of a CPU: they have no data, and unlike those of device meta they
know autocast, which casts there what it casts on a GPU, if LayerNorm's input is in fp32 as it is here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vitkernels import runtime, swap
from vitkernels.tools.aot.build import TARGETS, on_fake_tensors
from vitkernels.tools.aot.recorder import Event, FlashAttention, Recorder, recorded_launches
from vitkernels.tools.console import UserError, import_timm, one_line, warn
from vitkernels.tools.names import build, resolve

PROVIDERS = {"timm": "timm", "torch.compile": "timm by torch.compile", "vitkernels": "accelerated"}
PHASES = ("inference", "training, forward", "training, backward")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a block is called.

    Attributes:
        batch: Number of images, at the model's default size.
        autocast: fp32 parameters under autocast to bf16; otherwise all is bf16.
        drop_path: Probability of DropPath, which acts in training.
    """

    batch: int
    autocast: bool = False
    drop_path: float = 0.0

    def __str__(self) -> str:
        dtype = "fp32 parameters, bf16 autocast" if self.autocast else "bf16"
        return dtype + (f", DropPath {self.drop_path:g}" if self.drop_path else "")


class _Stop(Exception):
    pass


def call_of_block(model: nn.Module, shape: Sequence[int]) -> tuple[nn.Module, Tensor, tuple, dict[str, object]]:
    """Return the first block of ``model``, and with what the model calls it at images of ``shape``, (B, 3, Y, X).

    Of a model in stages, such as Swin, all blocks of the first stage count as one, as they differ by their shifts.

    Returns:
        The block, its input, and its further arguments by position and by name; the input is that of one image.

    Raises:
        ValueError: The model has no ``blocks``, or they convolve.
    """
    stages = getattr(model, "layers", None)
    staged = isinstance(stages, nn.Sequential) and len(stages) > 0
    blocks = getattr(stages[0] if staged else model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        raise ValueError(f"{type(model).__name__} has no blocks; expected a Vision Transformer of timm")
    if any(isinstance(module, nn.Conv2d) for module in blocks[0].modules()):
        raise ValueError(f"{type(model).__name__} has blocks of convolutions; expected a Vision Transformer of timm")
    seen = []

    def stop(module, args, kwargs):
        seen.append((args, kwargs))
        raise _Stop

    weight = next(model.parameters())
    hook = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_Stop), runtime.use_backend("torch"):
            model(torch.empty((1, *shape[1:]), dtype=weight.dtype, device=weight.device))
    finally:
        hook.remove()
    ((x, *args), kwargs) = seen[0]
    return nn.Sequential(*blocks) if staged else blocks[0], x, tuple(args), kwargs


def events_of_block(model_name: str, provider: str, setting: Setting, target: str = "sm_90") -> dict[str, list[Event]]:
    """Return what one block launches in each of :data:`PHASES`.

    Args:
        model_name: As for :func:`vitkernels.tools.names.resolve`.
        provider: ``timm``, ``torch.compile`` or ``vitkernels``.
        setting: How the block is called.
        target: Name in :data:`vitkernels.tools.aot.build.TARGETS`, whose launch configurations are taken.

    Raises:
        UserError: timm is missing, or does not know the name.
        ValueError: The model is no Vision Transformer.
    """
    timm = import_timm()
    with torch.device("meta"):
        model = build(resolve(model_name).for_timm)[0]
    size = timm.data.resolve_model_data_config(model)["input_size"]
    blocks = getattr(model, "blocks", ())
    if setting.drop_path and len(blocks):
        for name in ("drop_path1", "drop_path2"):
            if hasattr(blocks[0], name):
                setattr(blocks[0], name, timm.layers.DropPath(setting.drop_path))
    if provider == "vitkernels":
        swap.accelerate(model)
    if not setting.autocast:
        model.to(torch.bfloat16)
    with on_fake_tensors(TARGETS[target]):
        _without_data(model)
        with _autocast(setting):
            block, x, args, kwargs = call_of_block(model, (setting.batch, *size))
        x = x.new_empty((setting.batch, *x.shape[1:]))
        if provider != "torch.compile":
            with recorded_launches(recorder := Recorder(reads=False), TARGETS[target], "emulated"):
                return _by_phase(functools.partial(_record, recorder, block, x, args, kwargs, setting))
    return _by_phase(functools.partial(_record_compiled, block, x, args, kwargs, setting))


def counted_blocks(
    model_name: str, setting: Setting, providers: Sequence[str] = PROVIDERS, target: str = "sm_90"
) -> dict[str, dict[str, list[Event]]]:
    """Return :func:`events_of_block` by provider; where Inductor fails, warn and leave torch.compile's block out.

    Raises:
        UserError, ValueError: As for :func:`events_of_block`.
    """
    found = {}
    for provider in providers:
        try:
            found[provider] = events_of_block(model_name, provider, setting, target)
        except Exception as error:
            if provider != "torch.compile" or isinstance(error, UserError | ValueError):
                raise
            # Inductor's internals differ between versions of PyTorch.
            warn(f"torch.compile's block is not counted ({setting}): {type(error).__name__}: {one_line(error)}")
    return found


def _by_phase(record: Callable[[bool], list[Event]]) -> dict[str, list[Event]]:
    inference, training = record(False), record(True)
    forward, backward = ([e for e in training if e.phase == phase] for phase in ("forward", "backward"))
    return dict(zip(PHASES, (inference, forward, backward), strict=True))


def _without_data(model: nn.Module) -> None:
    """Replace every parameter and buffer by a fake one on the CPU."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _autocast(setting: Setting) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast)


def _record(
    recorder: Recorder, block: nn.Module, x: Tensor, args: tuple, kwargs: dict, setting: Setting, train: bool
) -> list[Event]:
    recorder.events, recorder.phase = [], "forward"
    block.train(train)
    x = x.detach().requires_grad_(train)
    with torch.set_grad_enabled(train), FlashAttention(), recorder, _autocast(setting):
        y = block(x, *args, **kwargs)
    if train:
        recorder.phase = "backward"
        wanting = [x, *(p for p in block.parameters() if p.requires_grad)]
        dy = torch.empty_like(y)
        with recorder:
            torch.autograd.grad(y, wanting, dy)
    # PyTorch launches nothing for an op whose result is empty.
    return [event for event in recorder.events if event.call or any(a.written and a.elements for a in event.accesses)]


def _record_compiled(
    block: nn.Module, x: Tensor, args: tuple, kwargs: dict, setting: Setting, train: bool
) -> list[Event]:
    from vitkernels.tools.aot.inductor import compiled_kernels

    def call(x: Tensor, state: dict[str, Tensor], args: tuple, kwargs: dict) -> Tensor:
        with FlashAttention(), _autocast(setting):
            return torch.func.functional_call(block, state, (x, *args), kwargs)

    block.train(train)
    x.requires_grad_(train)
    state = dict(block.named_parameters()) | dict(block.named_buffers())
    return [Event(*kernel) for kernel in compiled_kernels(call, (x, state, args, kwargs), train=train)]
