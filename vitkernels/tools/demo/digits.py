"""scikit-learn's handwritten digits in a fixed split, and the checkpoint trained on them.

1,797 real scans of 8×8 pixels: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
Machine Learning Repository, 1998, doi 10.24432/C50P49.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from vitkernels.models import VisionTransformer
from vitkernels.tools.console import UserError, one_line

CHECKPOINT = Path(__file__).with_name("digits.safetensors")
HELD_OUT = 450


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) in fp32, from -1 (paper) to 1 (ink), and labels (n,), 0 to 9."""

    images: Tensor
    labels: Tensor


def load_digits() -> tuple[Digits, Digits]:
    """Return the 1,347 training digits and the 450 held-out ones: a fixed split, stratified by label."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    data = datasets.load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target).long()
    parts = train_test_split(range(len(labels)), test_size=HELD_OUT, random_state=0, stratify=data.target)
    train, held_out = (Digits(images[part], labels[part]) for part in parts)
    return train, held_out


def fingerprint(digits: Digits) -> str:
    """Return a hash of the images; a checkpoint stores that of the digits it was not trained on."""
    return hashlib.sha256(digits.images.numpy().tobytes()).hexdigest()


def save_model(model: VisionTransformer, config: dict, path: Path, **notes: str) -> None:
    """Write the weights, with ``config`` (the model's arguments) and ``notes`` as metadata."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), path, metadata={"config": json.dumps(config), **notes})


def load_model(path: Path = CHECKPOINT) -> VisionTransformer:
    """Build the model that the file at ``path`` describes, load its weights, and return it in eval mode.

    Raises:
        UserError: :func:`save_model` did not write the file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            model = VisionTransformer(**json.loads(file.metadata()["config"]))
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no complete checkpoint of the digits model: {one_line(error)}") from error
    return model.eval()
