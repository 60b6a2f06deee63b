"""Readers for other libraries' files: weights in every supported format, and the config.json beside them."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor

State = dict[str, Tensor]

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# Keys under which training scripts keep the weights, in timm's order of search.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Name parts added by torch.compile, FSDP, its activation checkpointing and Fabric around the model or any part of it.
_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.",
)
_PREFIX = re.compile(r"^(?:module\.)+")  # of DistributedDataParallel and AveragedModel; the latter also has a counter
_AVERAGED = "n_averaged"
# Checkpoints of timm and DeiT also contain the command line.
_HARMLESS = [argparse.Namespace]


def read_weights(path: str | Path) -> State:
    """Read a state dict from a ``.safetensors`` file, a file of torch.save, or a directory that contains one of them.

    A file of torch.save is read with ``weights_only=True``. From a training checkpoint, this takes the same weights as
    timm: averaged ones under ``state_dict_ema`` or ``model_ema`` if there are any, else those under ``state_dict`` or
    ``model``. Prefixes of DistributedDataParallel, torch.compile, FSDP, Fabric and averaging, such as ``module.`` and
    ``_orig_mod.``, are removed, even several in a row.

    Raises:
        FileNotFoundError: There is no such file, or none in the directory.
        ValueError: The file is damaged or contains anything but tensors, such as code.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path} holds none of {', '.join(FILES)}")
        path = found[0]
    if path.name.endswith(".index.json"):
        try:
            parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no index of weights, an object with files by name under weight_map") from error
        if not all(isinstance(part, str) and part.endswith(".safetensors") for part in parts):
            raise ValueError(f"{path} names files that are no safetensors: {', '.join(map(str, parts))}")
        return {name: tensor for part in parts for name, tensor in read_weights(path.parent / Path(part).name).items()}
    checkpoint, where = _read_file(path), ""
    for _ in _NESTS:  # they can be nested, in a hostile file endlessly
        nests = checkpoint if isinstance(checkpoint, Mapping) else {}
        key = next((key for key in _NESTS if not isinstance(nests.get(key), (NoneType, Tensor))), None)
        if key is not None:
            checkpoint, where = nests[key], f" under {key}"
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}{where}; expected tensors by name")
    wrong = [str(name) for name, tensor in checkpoint.items() if not isinstance(tensor, Tensor)]
    if wrong:
        raise ValueError(f"{path} holds something else than tensors{where}: {', '.join(wrong[:8])}")
    state: State = {}
    for name, tensor in checkpoint.items():
        plain = _PREFIX.sub("", _WRAPPER.sub("", str(name)))
        if plain in state:
            raise ValueError(f"{path} holds two weights of the name {plain}; one of them is {name}")
        if plain != _AVERAGED:
            state[plain] = tensor
    return state


def read_config(path: str | Path) -> dict:
    """Return the object in the JSON file at ``path``, a model's config.json.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not JSON, or not an object; the error names the file.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected an object")
    return config


def _read_file(path: Path) -> object:
    """Return the contents of the file at ``path``, without running code in it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about plain pickles, which raise an error anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:  # each reader has its own errors for invalid bytes
        if path.suffix == ".safetensors":
            raise ValueError(f"{path} is no whole safetensors file: {error}") from error
        raise ValueError(_why_not_read(path)) from error


def _why_not_read(path: Path) -> str:
    """Return why the file at ``path`` could not be read; PyTorch's own message would suggest to run code in it."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            held = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a file of torch.save, or an old one
        held = []
    if held:
        names = [re.sub(r"[^\w.]", "?", name) for name in sorted(held)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"{path} holds {', '.join(names[:3])}{more}, which is not loaded, as that could run code: "
            "expected a file of plain tensors, as torch.save(model.state_dict(), …) writes"
        )
    return f"{path} is no whole file of plain tensors by torch.save; whatever else is in it is not loaded"
