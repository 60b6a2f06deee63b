"""What the training examples read: data sets of images, decoded and augmented by workers.

An image's augmentation is drawn from the seed, its epoch and its index. An image that does not decode is named on
stderr, and the next one of the data set takes its place.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import itertools
import math
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vitkernels.tools.console import UserError, import_torchvision, one_line
from vitkernels.tools.demo.image import open_image

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
PATIENCE = 10  # images in a row that may not decode


def seed_of(*numbers: int) -> int:
    """Return a seed below 2⁶³ for what ``numbers`` name, such as (seed, epoch, index)."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


class EncodedImage(io.BytesIO):
    """An encoded image in memory, which errors call by its name."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name

    def __str__(self) -> str:
        return self.name


class ImageFolder:
    """JPEG, PNG and WebP files in one subfolder a class."""

    def __init__(self, folder: Path):
        torchvision = import_torchvision()
        try:
            found = torchvision.datasets.DatasetFolder(folder, open_image, SUFFIXES)
        except OSError as error:
            raise UserError(f"cannot read images in {folder}: {one_line(error)}") from error
        self.samples, self.num_classes = found.samples, len(found.classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return open_image(path), label


class TarShards:
    """WebDataset's shards: uncompressed tar files, where ``KEY.jpg`` (or png, webp) is followed by its ``KEY.cls``.

    The shards are indexed once and then read at random, so they must lie on a disk. WebDataset's own reader streams
    them, and could not go on in the middle of an epoch without reading it from the start.
    """

    def __init__(self, folder: Path):
        self.shards = sorted(folder.glob("*.tar"))
        rows = [row for number in range(len(self.shards)) for row in self._index(number)]
        if not rows:
            raise UserError(
                f"the shards in {folder} hold no images; expected members that end in {', '.join(SUFFIXES)}"
            )
        self.rows = torch.tensor(rows)  # (n, 4): shard, where the image begins, its bytes, its label
        if self.rows[:, 3].min() < 0:
            raise UserError(f"the shards in {folder} hold a label below 0")
        self.num_classes = int(self.rows[:, 3].max()) + 1

    def _index(self, number: int) -> Iterator[tuple[int, int, int, int]]:
        path, images, labels, end = self.shards[number], {}, {}, 0
        try:
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    end = member.offset_data + math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")
                    if f".{suffix.lower()}" in SUFFIXES:
                        images[folder, key] = member
                    elif suffix.lower() == "cls":
                        labels[folder, key] = int(shard.extractfile(member).read())
            # tarfile takes the end of the file for the end of the shard, so a cut between two members would not show:
            # look for the empty block there.
            with path.open("rb") as file:
                file.seek(end)
                whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(f"{path} is no whole shard: {one_line(error)}") from error
        if not whole:
            raise UserError(f"{path} is no whole shard: it is cut off or damaged")
        if missing := images.keys() - labels.keys():
            raise UserError(f"{path} holds {images[min(missing)].name} without a .cls beside it")
        return ((number, image.offset_data, image.size, labels[key]) for key, image in images.items())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        shard, offset, size, label = self.rows[index].tolist()
        path = self.shards[shard]
        try:
            with path.open("rb") as file:
                file.seek(offset - tarfile.BLOCKSIZE)
                name = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "replace").name
                data = file.read(size)
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"cannot read {path}: {one_line(error)}") from error
        return open_image(EncodedImage(data, f"{path}/{name}")), label


class HuggingFace:
    """A data set that ``datasets.Dataset.save_to_disk`` wrote, with an Image and a ClassLabel column."""

    def __init__(self, folder: Path):
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"{folder} needs datasets ({one_line(error)}): pip install datasets") from error
        try:
            found = datasets.load_from_disk(str(folder))
        except Exception as error:  # each of its readers has its own errors
            raise UserError(f"{folder} cannot be loaded: {one_line(error)}") from error
        if isinstance(found, datasets.DatasetDict):
            raise UserError(f"{folder} holds {', '.join(found)}: give one of them, as {folder / next(iter(found))}")
        kinds = {type(feature): name for name, feature in found.features.items()}
        if not {datasets.Image, datasets.ClassLabel} <= kinds.keys():
            raise UserError(f"{folder} has the columns {found.features}; expected an Image and a ClassLabel")
        self.image, self.label = kinds[datasets.Image], kinds[datasets.ClassLabel]
        if any(label is None or label < 0 for label in found[self.label]):  # -1 stands for none, too
            raise UserError(f"{folder} holds images without a label")
        self.num_classes = found.features[self.label].num_classes
        self.rows = found.cast_column(self.image, datasets.Image(decode=False))
        self.folder = folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        row = self.rows[index]
        data, path = row[self.image]["bytes"], row[self.image]["path"]
        return open_image(path if data is None else EncodedImage(data, f"{self.folder}, row {index}")), row[self.label]


class Digits:
    """scikit-learn's handwritten digits, 8×8 pixels: 1,347 to train on, or the 450 held out."""

    num_classes = 10

    def __init__(self, held_out: bool):
        try:
            from vitkernels.tools.demo.digits import load_digits

            digits = load_digits()[held_out]
        except ImportError as error:
            raise UserError(f"--data digits needs {error.name}: pip install scikit-learn") from error
        self.pixels = ((digits.images[:, 0] + 1) * 127.5).round().byte().numpy()
        self.labels = digits.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        from PIL import Image

        return Image.fromarray(self.pixels[index]).convert("RGB"), self.labels[index]


def open_data(where: str, held_out: bool = False):
    """Return the data set that ``where`` names: ``digits``, or a folder, by what is in it.

    Returns:
        A sequence of (Pillow image, label), with ``num_classes``. To read an image that does not decode raises
        UserError.

    Raises:
        UserError: There is no such folder, or what is in it cannot be read.
    """
    if where == "digits":
        return Digits(held_out)
    folder = Path(where)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if any(folder.glob("*.tar")):
        return TarShards(folder)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return HuggingFace(folder)
    return ImageFolder(folder)


def open_both(args: argparse.Namespace):
    """Return the data set to train on, and the held-out one or None.

    Raises:
        UserError: As :func:`open_data`; or their classes are not equally many, so that the labels may differ.
    """
    data, held_out = open_data(args.data), open_data(args.val, held_out=True) if args.val else None
    if held_out is not None and held_out.num_classes != data.num_classes:
        raise UserError(f"{args.val} has {held_out.num_classes} classes, and {args.data} has {data.num_classes}")
    return data, held_out


class Decoded(NamedTuple):
    """A batch as a worker hands it over: (n, 3, Y, X) in uint8, (n,) in int64, and what was skipped for what reason."""

    images: Tensor
    labels: Tensor
    skipped: list[str]


class Samples(Dataset):
    """Decodes and augments the image that (epoch, index) names, always in the same way."""

    def __init__(self, data, transform: Callable, seed: int):
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, where: tuple[int, int]) -> tuple[Tensor, int, list[str]] | UserError:
        epoch, index = where
        skipped = []
        for i in range(PATIENCE):
            try:
                image, label = self.data[(index + i) % len(self.data)]
            except UserError as error:
                cause = error.__cause__
                if isinstance(cause, OSError) and cause.errno is not None:
                    return error  # the system cannot read it: the disk may be gone, and all would be skipped
                skipped.append(one_line(error))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))  # torch.manual_seed takes 250 µs
                return self.transform(image), label, skipped
        return UserError(f"{PATIENCE} images in a row do not decode, the last because {skipped[-1]}")


def collate(items: list[tuple[Tensor, int, list[str]] | UserError], stack: Callable) -> Decoded | UserError:
    """Make a batch; return the error, which a worker cannot raise as it is, if there is one."""
    for item in items:
        if isinstance(item, UserError):
            return item
    images, labels, skipped = zip(*items, strict=True)
    return Decoded(stack(images), torch.tensor(labels), [*itertools.chain(*skipped)])


def train_transform(size: int, crop_scale: float, flip: bool) -> Callable:
    """Return a random crop of ``crop_scale`` to 1 of the area, resized to ``size``; ``flip`` mirrors half of them."""
    import_torchvision()
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(size, scale=(crop_scale, 1.0), antialias=True)]
    return v2.Compose([*steps, *([v2.RandomHorizontalFlip()] if flip else []), v2.PILToTensor()])


def eval_transform(size: int) -> Callable:
    """Return the largest square in the middle, resized to ``size``."""
    import_torchvision()
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])


def load(
    data, transform: Callable, batches, args: argparse.Namespace, stack: Callable = default_collate
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and the labels (n,) of each of ``batches``, decoded by workers.

    The images are what ``stack`` makes of a list of what ``transform`` returns: (n, 3, Y, X) in uint8, or a dictionary
    of tensors.

    Raises:
        UserError: The system cannot read an image, or many in a row do not decode.
    """
    loader = DataLoader(
        Samples(data, transform, args.seed),
        batch_sampler=batches,
        num_workers=args.workers,
        collate_fn=functools.partial(collate, stack=stack),
        worker_init_fn=_leave_interrupts,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        for why in batch.skipped:
            print(f"skipped: {why}", file=sys.stderr)
        yield batch.images, batch.labels


def _leave_interrupts(worker: int) -> None:
    """Let Ctrl-C end the main process only, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
