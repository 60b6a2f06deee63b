"""Load a model: by timm's name, from a folder of transformers or timm, or from a function of the user's.

Nothing is downloaded. Only code of the installed packages and of the module that the user names is run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vitkernels.swap.estimate import image_size
from vitkernels.tools.console import UserError, near, one_line, prepare_torchvision
from vitkernels.tools.names import build, resolve


class Inputs(NamedTuple):
    """The arguments of a model's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Inputs:
        """Return the inputs detached, on ``device``, with floating-point tensors in ``dtype``."""

        def move(t: Tensor) -> Tensor:
            return t.detach().to(device, dtype if t.is_floating_point() else None)

        return Inputs(*tree_map_only(Tensor, move, tuple(self)))


def as_inputs(given: object) -> Inputs:
    """Convert ``given`` (a tensor, a tuple of arguments, or a dict of keyword arguments) to :class:`Inputs`."""
    if isinstance(given, Inputs):
        return given
    if isinstance(given, Mapping):
        return Inputs((), dict(given))
    return Inputs(tuple(given) if isinstance(given, (tuple, list)) else (given,), {})


def load(spec: str, batch: int = 2) -> tuple[nn.Module, Inputs, str]:
    """Return the model that ``spec`` names, its inputs, and a description.

    Args:
        spec: A name that :func:`vitkernels.tools.names.resolve` accepts: timm's name, for random weights, or a folder
            of transformers or timm, with or without weights. Or ``module:function``, where ``function()`` returns the
            model, or the model and its inputs (a tensor, a tuple of arguments or a dict of keyword arguments). Python
            must find the module from the current folder.
        batch: How many images to draw if the function returns no inputs.

    Raises:
        UserError: There is no such model, something it needs is missing, or building it fails.
    """
    try:
        if ":" in spec and "/" not in spec and not spec.startswith(("hf_hub:", "hf-hub:", "local-dir:")):
            return _of_function(spec, batch)
        named = resolve(spec)
        model, words = build(named, weights=named.has_weights)
        if hasattr(model, "vision_model") and hasattr(model, "text_model"):
            model, words = model.vision_model, f"{words}, its vision part"
        return model, _images(named.name, model, batch), words
    except UserError:
        raise
    except Exception as error:  # libraries and the user's code may raise anything
        raise UserError(f"{spec} cannot be built: {type(error).__name__}: {one_line(error)}") from error


def _of_function(spec: str, batch: int) -> tuple[nn.Module, Inputs, str]:
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    prepare_torchvision()  # the module may import timm or transformers
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{module_name} needs {error.name}, which is not installed") from error
        raise UserError(f"there is no module {module_name!r} in {here} or among the installed packages") from error
    function = getattr(module, name, None)
    if not callable(function):
        what = "is no function" if hasattr(module, name) else "does not exist"
        functions = (n for n, value in vars(module).items() if callable(value))
        raise UserError(f"{spec}: {name!r} {what} in {module.__name__}{near(name, functions)}")
    made = function()
    model, given = made if isinstance(made, (tuple, list)) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UserError(f"{spec} returned a {type(model).__name__}; expected a torch.nn.Module, or one and its inputs")
    return model, _images(spec, model, batch) if given is None else as_inputs(given), f"what {spec} returns"


def _images(name: str, model: nn.Module, batch: int) -> Inputs:
    """Return random images of the size that ``model`` takes; the same at every call."""
    size = image_size(model)
    if size is None:
        raise UserError(f"the size of the images that {name} takes is not known; give module:function, returning both")
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    is_of_transformers = type(model).__module__.startswith("transformers.")
    return Inputs((), {"pixel_values": images}) if is_of_transformers else Inputs((images,), {})
