"""Train one Vision Transformer with several heads: the class of an image, and of each pixel its class and depth.

    python examples/hydra.py --out run --img-size 64 --model vit_tiny_patch16_224 --model-kwargs patch_size=8
    torchrun --nproc-per-node 8 examples/hydra.py --data rooms/train --val rooms/test --mask-classes 41 --out run \\
        --model vit_small_patch14_dinov2 --pretrained --freeze --img-size 518

The backbone runs once for all tasks. The dense heads read patch tokens of four of its blocks
(``forward_intermediates``), the classifier reads its pooled tokens; a learned weight a task balances the losses
(arXiv 1705.07115). With --freeze only the heads are trained, and no gradient goes through the backbone.

Without --data, images are drawn: discs, squares and triangles at several depths, the nearest of which is the class. A
data set of yours is a folder with ``labels.csv``, of the columns ``file`` and ``label``, and for each of its files
``images/FILE``; ``masks/STEM.png``, one byte a pixel, 255 where there is no class; and ``depth/STEM.png``, 16 bits a
pixel, in millimetres, 0 where it is not known.

What happens when the run is killed: see examples/common.py; when an image does not decode: examples/image_data.py.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import KeyValues, Processes, number, positive, seed_of
from torch import Tensor, nn

from vitkernels.tools.console import UserError, import_timm, one_line, write_file
from vitkernels.tools.demo.image import open_image
from vitkernels.tools.names import build, resolve

TASKS = ("labels", "masks", "depths")
UNLABELLED = 255  # in masks


class Shapes:
    """Drawn scenes: (image (3, S, S) in uint8, mask (S, S) in uint8, depth (S, S) in fp32), and the class."""

    num_classes, mask_classes = 3, 4  # disc, square, triangle; of pixels also the background

    def __init__(self, images: int, size: int, seed: int):
        self.images, self.size, self.seed = images, size, seed

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        draw = torch.Generator().manual_seed(seed_of(self.seed, index))
        y, x = torch.meshgrid(*[torch.linspace(-1, 1, self.size)] * 2, indexing="ij")
        depth = 6.0 - 2 * (y + 1)  # the ground comes nearer towards the lower edge
        mask, image = torch.zeros_like(y, dtype=torch.uint8), depth.expand(3, -1, -1) / 8
        for distance in torch.linspace(1.8, 0.8, 3):
            kind = int(torch.randint(3, (), generator=draw))
            (down, right), colour = torch.rand(2, generator=draw) * 1.2 - 0.6, torch.rand(3, 1, 1, generator=draw)
            dy, dx, radius = y - down, x - right, 0.4 / distance
            inside = (dy**2 + dx**2 < radius**2, torch.maximum(dy.abs(), dx.abs()) < radius, 2 * dx.abs() < dy + radius)
            here = inside[kind] & (dy < radius)
            mask[here], depth = kind + 1, torch.where(here, distance, depth)
            image = torch.where(here, colour, image)
        noise = 0.1 * torch.randn(3, self.size, self.size, generator=draw)
        return (((image + noise).clamp(0, 1) * 255).byte(), mask, depth), kind


class Scenes:
    """A folder of scenes as the module's docstring describes it; items as of :class:`Shapes`."""

    def __init__(self, folder: Path, mask_classes: int, names: list[str] | None = None):
        self.folder, self.mask_classes = folder, mask_classes
        try:
            with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
                self.rows = [(row["file"], row["label"]) for row in csv.DictReader(file)]
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
        except (KeyError, ValueError, csv.Error) as error:
            raise UserError(f"{folder / 'labels.csv'} has no columns file and label: {one_line(error)}") from error
        if not self.rows or not all(file and label for file, label in self.rows):
            raise UserError(f"{folder / 'labels.csv'} names no images, or has a line without file or label")
        self.names = sorted({label for _, label in self.rows}) if names is None else names
        for file, label in self.rows:
            if missing := [path for path in self._paths(file) if not path.is_file()]:
                raise UserError(f"{folder / 'labels.csv'} names {file}, but there is no {missing[0]}")
            if label not in self.names:
                raise UserError(f"{folder / 'labels.csv'} has the label {label!r}, which is not among {self.names}")
        self.num_classes = len(self.names)

    def _paths(self, file: str) -> tuple[Path, Path, Path]:
        png = Path(file).with_suffix(".png")
        return self.folder / "images" / file, self.folder / "masks" / png, self.folder / "depth" / png

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        from torchvision.transforms.v2.functional import pil_to_tensor

        file, label = self.rows[index]
        of_image, of_mask, of_depth = self._paths(file)
        image = pil_to_tensor(open_image(of_image))
        mask, depth = read_map(of_mask, ("L", "P")), read_map(of_depth, ("I;16", "I;16B", "I"))
        for path, one in ((of_mask, mask), (of_depth, depth)):
            if one.shape != image.shape[1:]:
                raise UserError(f"{path} has {tuple(one.shape)} pixels, and its image {tuple(image.shape[1:])}")
        if (worst := int(mask[mask != UNLABELLED].max(initial=0))) >= self.mask_classes:
            raise UserError(f"{of_mask} holds class {worst}; --mask-classes says 0 to {self.mask_classes - 1}")
        return (image, torch.from_numpy(mask), torch.from_numpy(depth / 1000).float()), self.names.index(label)


def read_map(path: Path, modes: tuple[str, ...]):
    """Return the pixels of a PNG of one of Pillow's ``modes``, (Y, X), in NumPy."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            if image.mode not in modes:
                raise UserError(f"{path} is of mode {image.mode}; expected {' or '.join(modes)}")
            return np.array(image)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except (SyntaxError, ValueError) as error:  # Pillow's, for broken files
        raise UserError(f"{path} is a broken image: {one_line(error)}") from error


class Resized:
    """Resizes a scene, and mirrors a random half of them: a dictionary of ``images``, ``masks`` and ``depths``."""

    def __init__(self, size: int, flip: bool):
        from torchvision.transforms import v2

        flips = [v2.RandomHorizontalFlip()] if flip else []
        self.steps = v2.Compose([v2.Resize((size, size), antialias=True), *flips, v2.ToPureTensor()])

    def __call__(self, scene: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        from torchvision import tv_tensors

        image, mask, depth = scene  # maps are not interpolated
        kinds = {"images": tv_tensors.Image(image), "masks": tv_tensors.Mask(mask), "depths": tv_tensors.Mask(depth)}
        return self.steps(kinds)


class Hydra(nn.Module):
    """A backbone of timm with a classifier and two dense heads; images (B, 3, Y, X).

    Returns:
        ``labels`` (B, classes) and ``masks`` (B, mask classes, Y, X), which are logits; ``depths`` (B, Y, X), the
        logarithm of metres; and ``log_variances`` (3,), by which the losses of the tasks are weighted.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, mask_classes: int, freeze: bool, width: int = 128):
        super().__init__()
        self.backbone, self.freeze, depth = backbone.requires_grad_(not freeze), freeze, len(backbone.blocks)
        self.pretrained_cfg = backbone.pretrained_cfg
        self.indices = sorted({max(0, depth * i // 4 - 1) for i in (1, 2, 3, 4)})  # of the blocks that are read
        self.neck = nn.Sequential(nn.Conv2d(backbone.embed_dim * len(self.indices), width, 1), nn.GELU())
        self.labels = nn.Linear(backbone.num_features, num_classes)
        self.masks = nn.Conv2d(width, mask_classes, 3, padding=1)
        self.depths = nn.Conv2d(width, 1, 3, padding=1)
        self.log_variances = nn.Parameter(torch.zeros(len(TASKS)))

    @property
    def blocks(self) -> nn.Module:
        """The backbone's blocks, which are recomputed, compiled and sharded one by one."""
        return self.backbone.blocks

    def train(self, mode: bool = True) -> Hydra:
        """Set the mode, in which a frozen backbone drops nothing."""
        super().train(mode)
        self.backbone.train(mode and not self.freeze)
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            tokens, maps = self.backbone.forward_intermediates(images, self.indices, norm=True)
            pooled = self.backbone.forward_head(tokens, pre_logits=True)
        dense = self.neck(torch.cat(maps, dim=1))
        masks, depths = (
            F.interpolate(head(dense), size=images.shape[2:], mode="bilinear") for head in (self.masks, self.depths)
        )
        # FSDP2 warns of a view, so the depths are a copy.
        found = {"labels": self.labels(pooled), "masks": masks, "depths": depths[:, 0].clone()}
        return found | {"log_variances": self.log_variances.clone()}


def losses(found: dict[str, Tensor], batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the losses (3, B): two cross-entropies, and the mean difference of the depths' logarithms."""
    of_pixels = F.cross_entropy(
        found["masks"].float(), batch["masks"].long(), ignore_index=UNLABELLED, reduction="none"
    )
    labelled, known = batch["masks"] != UNLABELLED, batch["depths"] > 0
    off = (found["depths"].float() - batch["depths"].clamp(min=1e-3).log()).abs() * known
    return torch.stack(
        [
            F.cross_entropy(found["labels"].float(), labels, reduction="none"),
            of_pixels.sum((1, 2)) / labelled.sum((1, 2)).clamp(min=1),
            off.sum((1, 2)) / known.sum((1, 2)).clamp(min=1),
        ]
    )


def loss_of(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the sum over images of the tasks' losses, each weighted by a learned variance."""
    found = model(common.normalized(batch["images"], model))
    log_variances = found["log_variances"][:, None]
    return (losses(found, batch, labels) * (-log_variances).exp() + log_variances).sum()


@torch.no_grad()
def evaluate(args: argparse.Namespace, processes: Processes, model: nn.Module, data) -> None:
    """Print the share of right labels, the mean intersection over union, and the depths' mean relative error."""
    K = data.mask_classes
    confusion = torch.zeros(K * K, dtype=torch.int64, device=processes.device)  # truth · K + predicted
    sums = torch.zeros(3, dtype=torch.float64, device=processes.device)  # right labels; errors, pixels of depth
    model.eval()
    for batch, labels, counted in common.held_out(data, Resized(args.img_size, flip=False), args, processes):
        with common.autocast(args, processes):
            found = model(common.normalized(batch["images"], model))
        found, batch = ({key: value[:counted] for key, value in one.items()} for one in (found, batch))
        truth, depths, known = batch["masks"].long(), batch["depths"], batch["depths"] > 0
        pairs = (truth * K + found["masks"].argmax(1))[truth != UNLABELLED]
        confusion += torch.bincount(pairs, minlength=K * K)
        errors = (found["depths"].double().exp() - depths).abs()[known] / depths[known]
        right = (found["labels"].argmax(1) == labels[:counted]).sum()
        sums += torch.stack([right, errors.sum(), known.sum()]).double()
    dist.all_reduce(confusion)
    dist.all_reduce(sums)
    confusion = confusion.view(K, K)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    overlap = (confusion.diag() / union)[union > 0].mean()
    right, errors, pixels = sums.tolist()
    if processes.rank == 0:
        print(f"held out: {int(right)} of {len(data)} labels right, mean IoU {overlap:.3f}, ", end="")
        print(f"depth off by {100 * errors / max(1, pixels):.1f} %")


def hydra(args: argparse.Namespace, processes: Processes) -> None:
    """Train, write the weights, and evaluate on the held-out images.

    Raises:
        UserError: The data, the model, the output or a checkpoint stands in the way; the text says how.
    """
    common.check_options(args, processes)
    import_timm()
    if args.data is None:
        data = Shapes(args.images, args.img_size, seed_of(args.seed, 0))
        val = Shapes(max(1, args.images // 10), args.img_size, seed_of(args.seed, 1))
    else:
        data = Scenes(args.data, args.mask_classes)
        val = None if args.val is None else Scenes(args.val, args.mask_classes, data.names)
    torch.manual_seed(args.seed)
    options = {"num_classes": 0, "img_size": args.img_size} | args.model_kwargs
    backbone, _ = build(resolve(args.model, may_download=True).for_timm, weights=args.pretrained, **options)
    if not all(hasattr(backbone, name) for name in ("blocks", "forward_intermediates", "forward_head")):
        raise UserError(f"{args.model} is a {type(backbone).__name__}; expected a Vision Transformer of timm")
    model = common.prepare(Hydra(backbone, data.num_classes, data.mask_classes, args.freeze), args, processes)
    optimizer = torch.optim.AdamW(common.decay_groups(model, args.weight_decay), lr=args.learning_rate)
    common.train(args, processes, model, optimizer, data, args.steps, loss_of, Resized(args.img_size, args.flip))
    weights = common.whole_weights(model)
    if processes.rank == 0:
        from safetensors.torch import save

        write_file(args.out / "model.safetensors", save({key: value.contiguous() for key, value in weights.items()}))
    if val is not None:
        evaluate(args, processes, model, val)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, train, and turn errors into one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with labels.csv, images, masks and depth; images are drawn without it")
    add("--val", type=Path, help="such a folder, to be evaluated in the end")
    add("--mask-classes", type=positive, default=21, metavar="N", help="of the masks in --data (%(default)s)")
    add("--images", type=positive, default=10000, metavar="N", help="to be drawn without --data (%(default)s)")
    add("--img-size", type=positive, default=224, metavar="PIXELS", help="height and width (%(default)s)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror a random half of the images")
    add("--batch-size", type=positive, default=64, metavar="N", help="images a step (%(default)s)")
    add("--micro-batch", type=positive, default=64, metavar="N", help="images at once on a process (%(default)s)")
    add("--model", default="vit_small_patch16_224", help="a Vision Transformer of timm (%(default)s)")
    add("--model-kwargs", action=KeyValues, nargs="+", default={}, metavar="KEY=VALUE", help="changes to it")
    add("--pretrained", action="store_true", help="begin with timm's weights, which may be downloaded")
    add("--freeze", action="store_true", help="train the heads only")
    add("--steps", type=positive, default=10000, metavar="N", help="of the optimizer, AdamW (%(default)s)")
    add("--weight-decay", type=number(float, 0), default=0.05, metavar="RATE", help="(%(default)s)")
    common.add_run_options(parser, learning_rate=3e-4, warm_up=500)
    args = parser.parse_args(argv)
    with common.one_line_errors("hydra"):
        hydra(args, common.start_processes())


if __name__ == "__main__":
    main()
