"""Files that others wrote: weights, of which one function reads every kind, and the config.json beside them."""

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
# Where training scripts keep the weights, and in which order timm looks for them.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Of torch.compile, FSDP, its activation checkpointing and Fabric, around the model or any part of it.
_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.",
)
_PREFIX = re.compile(r"^(?:module\.)+")  # of DistributedDataParallel, and of AveragedModel, which has a counter too
_AVERAGED = "n_averaged"
# timm's and DeiT's checkpoints keep the command line beside the weights.
_HARMLESS = [argparse.Namespace]


def read_weights(path: str | Path) -> State:
    """Read a state dict: a ``.safetensors`` file, one by torch.save, or a directory that holds one or the other.

    A file by torch.save is read with ``weights_only=True``. Of a training run's checkpoint the weights are, as in timm,
    the averaged ones under ``state_dict_ema`` or ``model_ema`` where there are any, else what is under ``state_dict``
    or ``model``. What DistributedDataParallel, torch.compile, FSDP, Fabric and averaging put in front of names, such as
    ``module.`` and ``_orig_mod.``, is taken off, also several of them.

    Raises:
        FileNotFoundError: There is no such file, or none in the directory.
        ValueError: The file holds something else than tensors, such as code, or is damaged.
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
    for _ in _NESTS:  # one may lie in another, and a hostile one in itself
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
        ValueError: It is no JSON, or no object; the text names the file.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected an object")
    return config


def _read_file(path: Path) -> object:
    """Return what the file at ``path`` holds; nothing in it is run."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are no file by torch.save, which is an error all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:  # each reader has its own errors for bytes that make no sense
        if path.suffix == ".safetensors":
            raise ValueError(f"{path} is no whole safetensors file: {error}") from error
        raise ValueError(_why_not_read(path)) from error


def _why_not_read(path: Path) -> str:
    """Return why the file at ``path`` is none of plain tensors, in our words: PyTorch's advise to run what is in it."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            held = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it is no file by torch.save, or an old one
        held = []
    if held:
        names = [re.sub(r"[^\w.]", "?", name) for name in sorted(held)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"{path} holds {', '.join(names[:3])}{more}, which is not loaded, as that could run code: "
            "expected a file of plain tensors, as torch.save(model.state_dict(), …) writes"
        )
    return f"{path} is no whole file of plain tensors by torch.save; whatever else is in it is not loaded"
