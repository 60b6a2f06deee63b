"""Train timm's NaFlexViT on images of any size, and embed them, at their own aspect ratio and packed without padding.

    python examples/naflex.py train photos/train --val photos/test --out run --model naflexvit_base_patch16_gap
    torchrun --nproc-per-node 8 examples/naflex.py train photos/train --val photos/test --out run --model …
    python examples/naflex.py embed photos/test --out embeddings --model run

An image keeps its size, rounded up to whole patches; one of more than --max-tokens patches is reduced. A batch takes
images until their patches fill --tokens, so large images come in small batches, as in NaViT (arXiv 2307.06304). timm
pads each image to the longest of its batch and masks the padding. In the accelerated model the blocks see one row of
tokens instead, and attention where each image begins in it (``cu_seqlens``). What padding adds is counted and printed.

The same command line goes on where a run was stopped: ``train`` from its newest checkpoint, as ``common.py`` says, and
``embed`` after the shards that are there, as ``embed.py`` says. An error is one line and exit status 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import common
import image_data
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import KeyValues, Processes, number, positive
from embed import Images, check_same_run, leave_interrupts, list_images, load_model, shard_bytes
from image_data import seed_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import vitkernels
from vitkernels.tools.console import UserError, check_can_fill, import_timm, track, write_file
from vitkernels.tools.names import build, resolve

Places = list[tuple[int, int]]  # images by epoch and index


class Patches:
    """Cuts a Pillow image into ``patches`` (n, P·P·3) in uint8, with ``patch_coord`` (n, 2), ``patch_valid`` (n,)."""

    def __init__(self, model: nn.Module, max_tokens: int, flip: bool = False):
        from timm.data.naflex_transforms import ResizeToSequence
        from torchvision.transforms import v2

        self.patch_size, self.max_tokens = model.embeds.patch_size, max_tokens
        steps = [ResizeToSequence(self.patch_size, max_tokens, max_ratio=1.0), v2.PILToTensor()]
        self.steps = v2.Compose(([v2.RandomHorizontalFlip()] if flip else []) + steps)

    def __call__(self, image) -> dict[str, Tensor]:
        from timm.data.naflex_transforms import patchify_image

        cut = patchify_image(self.steps(image), self.patch_size)
        return dict(zip(("patches", "patch_coord", "patch_valid"), cut, strict=True))

    def count(self, path: str | Path) -> int:
        """Return the number of patches of the image at ``path``, of which only the header is read."""
        from PIL import Image
        from timm.data.naflex_transforms import get_image_size_for_seq

        try:
            with Image.open(path) as image:
                size = image.height, image.width
            _, (height, width) = get_image_size_for_seq(size, self.patch_size, self.max_tokens, max_ratio=1.0)
        except Exception:  # of many kinds; decoding will name the image
            return self.max_tokens
        return (height // self.patch_size[0]) * (width // self.patch_size[1])


def pad(images: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return timm's batch of ``images``, each padded to the longest."""
    images = list(images)
    return {key: pad_sequence([image[key] for image in images], batch_first=True) for key in images[0]}


def normalized(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return ``batch`` with its pixels in fp32, with the mean and deviation of timm's model."""
    pixels = batch["patches"].unflatten(-1, (-1, 3)).movedim(-1, 1)  # (B, 3, N, P·P)
    return batch | {"patches": common.normalized(pixels, model).movedim(1, -1).flatten(-2)}


def by_budget(places: Iterable[tuple[int, int]], lengths: list[int], budget: int) -> Iterator[Places]:
    """Cut ``places`` into batches of as many images as fit into ``budget`` patches, but of one at least."""
    batch, left = [], budget
    for place in places:
        if batch and lengths[place[1]] > left:
            yield batch
            batch, left = [], budget
        batch.append(place)
        left -= lengths[place[1]]
    if batch:
        yield batch


def shuffled(images: int, seed: int) -> Iterator[tuple[int, int]]:
    """Yield places without end: all images in one order, and then in another."""
    for epoch in itertools.count():
        order = torch.randperm(images, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
        yield from ((epoch, index) for index in order.tolist())


def by_length(places: Iterable[tuple[int, int]], lengths: list[int]) -> Places:
    """Return ``places`` with images of about the same length beside one another."""
    return sorted(places, key=lambda place: lengths[place[1]])


class Count:
    """Counts images, their patches, and what padding each to the longest of its batch adds."""

    def __init__(self):
        self.images = self.patches = self.padding = 0

    def add(self, batch: Places, lengths: list[int]) -> None:
        used = [lengths[index] for _, index in batch]
        self.images += len(used)
        self.patches += sum(used)
        self.padding += len(used) * max(used) - sum(used)

    def __str__(self) -> str:
        more = 100 * self.padding / max(1, self.patches)
        return f"{self.images} images of {self.patches} patches; padding would add {self.padding} ({more:.1f} %)"


class Budget:
    """The batches of a run, in place of :class:`common.Shares`: how many images one has depends on their sizes."""

    parts = 1

    def __init__(self, lengths: list[int], args: argparse.Namespace, processes: Processes):
        self.lengths, self.args, self.processes, self.count = lengths, args, processes, Count()

    def begin(self, steps: range) -> Budget:
        """Make ready for ``steps``."""
        batches = by_budget(shuffled(len(self.lengths), self.args.seed), self.lengths, self.args.tokens)
        # The workers load some batches ahead of the step that asks for the number of images.
        self.ahead, self.now = itertools.tee(itertools.islice(batches, steps.start, steps.stop))
        return self

    def deal(self, batch: Places) -> list[Places]:
        """Deal images of about the same length out to each process."""
        ordered = by_length(batch, self.lengths)
        return [ordered[rank :: self.processes.size] for rank in range(self.processes.size)]

    def __iter__(self) -> Iterator[Places]:
        return (self.deal(batch)[self.processes.rank] for batch in self.ahead)

    def images_in(self, step: int) -> int:
        """Return how many images all processes take in ``step``, the one after that of the last call."""
        batch = next(self.now)
        for share in self.deal(batch):
            self.count.add(share, self.lengths)
        return len(batch)


def check_naflex(model: nn.Module, name: str) -> None:
    """Refuse a model that takes no patches of images of different sizes."""
    from timm.models.naflexvit import NaFlexVit

    if not (isinstance(model, NaFlexVit) and model.embeds.is_linear):
        raise UserError(f"{name} is a {type(model).__name__}; expected a NaFlexVit, as naflexvit_base_patch16_gap")


def train(args: argparse.Namespace, processes: Processes) -> None:
    """Train from the newest checkpoint to the end, write the model, and classify ``--val``.

    Raises:
        UserError: The data, the model, a checkpoint or the disk stand in the way.
    """
    if args.parallel == "fsdp" or args.recompute != "nothing":
        raise UserError(
            "--parallel fsdp and --recompute change the blocks, which then take padded images: leave them out"
        )
    # Else a process may have no image of a batch, as one ends where the next image does not fit.
    if args.tokens < processes.size * args.max_tokens:
        raise UserError(
            f"--tokens {args.tokens} is less than {processes.size} processes · --max-tokens {args.max_tokens}"
        )
    import_timm()
    data, val = image_data.open_both(args)
    for one, where in ((data, args.data), (val, args.val)):
        if not isinstance(one, image_data.ImageFolder | None):
            raise UserError(f"{where} is no folder of images in one subfolder a class")
    if processes.rank == 0:
        check_can_fill(args.out)
    torch.manual_seed(args.seed)
    options = args.model_kwargs | {"num_classes": data.num_classes}
    plain, _ = build(resolve(args.model, may_download=True).for_timm, weights=args.pretrained, **options)
    check_naflex(plain, args.model)
    transform = Patches(plain, args.max_tokens, args.flip)
    lengths = [transform.count(path) for path, _ in data.samples]
    args.patches = sum(lengths)  # with the options, what a checkpoint must have been made with
    model = common.prepare(plain, args, processes)
    optimizer = torch.optim.AdamW(common.decay_groups(model, args.weight_decay), lr=args.learning_rate)
    budget = Budget(lengths, args, processes)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        return F.cross_entropy(model(normalized(batch, model)).float(), labels, reduction="sum")

    common.train(args, processes, model, optimizer, data, args.steps, loss_of, transform, budget.begin, pad)
    weights = common.whole_weights(model)
    if processes.rank == 0:
        cfg = plain.pretrained_cfg
        kwargs = {"img_size": cfg["input_size"][1]} | (getattr(plain, "pretrained_model_args", {}) | args.model_kwargs)
        common.export(args.out, weights, cfg["architecture"], data.num_classes, plain, **kwargs)
        print(f"naflex: trained on {budget.count}")
    if val is not None:
        evaluate(args, processes, plain.eval(), val)


@torch.inference_mode()
def evaluate(args: argparse.Namespace, processes: Processes, model: nn.Module, data: image_data.ImageFolder) -> None:
    """Print how many images of ``data`` the model classifies right."""
    transform, count = Patches(model, args.max_tokens), Count()
    lengths = [transform.count(path) for path, _ in data.samples]
    batches = [*by_budget(by_length(((0, i) for i in range(len(data))), lengths), lengths, args.tokens)]
    for batch in batches:
        count.add(batch, lengths)
    right = torch.zeros((), dtype=torch.int64, device=processes.device)
    for images, labels in image_data.load(data, transform, batches[processes.rank :: processes.size], args, stack=pad):
        with common.autocast(args, processes):
            predicted = model(normalized(common.to_device(images, processes), model)).argmax(-1)
        right += (predicted == labels.to(processes.device)).sum()
    dist.all_reduce(right)
    if processes.rank == 0:
        print(f"held out: {right} of {len(data)} right; {count}")


def collate(items: list[tuple[str, dict[str, Tensor] | str | UserError]]) -> tuple[list[str], dict | None, dict]:
    """Return the names and the batch of the decoded images, and why the others are not."""
    decoded = {file: got for file, got in items if isinstance(got, dict)}
    failed = {file: got for file, got in items if file not in decoded}
    return list(decoded), pad(decoded.values()) if decoded else None, failed


@torch.inference_mode()
def embed(args: argparse.Namespace, processes: Processes) -> None:
    """Write those shards of embeddings that are missing.

    Raises:
        UserError: The images, the model or the output stand in the way.
    """
    files = list_images(args.data)
    check_can_fill(args.out)
    model, weights = load_model(args.model, None)
    check_naflex(model, args.model)
    transform = Patches(model, args.max_tokens)
    lengths = [transform.count(args.data / file) for file in files]
    settings = {key: getattr(args, key) for key in ("model", "tokens", "max_tokens", "shard_size")}
    settings |= {"weights": weights, "names of images": seed_of(*files), "number of patches": sum(lengths)}
    check_same_run(args.out, "safetensors", settings)
    model.to(processes.device)
    if args.accelerate:
        vitkernels.accelerate(model)
    starts = range(0, len(files), args.shard_size)
    names = [args.out / f"embeddings-{i:05}-of-{len(starts):05}.safetensors" for i in range(1, len(starts) + 1)]
    mine = [*zip(names, starts, strict=True)][processes.rank :: processes.size]
    count, skipped = Count(), 0
    for path, start in track(mine, "Embedding") if processes.rank == 0 else mine:
        if path.is_file():
            continue
        places = ((0, i) for i in range(start, min(start + args.shard_size, len(files))))
        batches = [*by_budget(by_length(places, lengths), lengths, args.tokens)]
        loader = DataLoader(
            Images(args.data, files, transform),
            batch_sampler=[[index for _, index in batch] for batch in batches],
            num_workers=args.workers,
            collate_fn=collate,
            worker_init_fn=leave_interrupts,
        )
        done, vectors, failed = [], [torch.empty(0, model.num_features)], {}
        for batch, (decoded, images, not_decoded) in zip(batches, loader, strict=True):
            for why in not_decoded.values():
                if isinstance(why, UserError):
                    raise why
                print(f"naflex: skipped: {why}", file=sys.stderr)
            failed |= not_decoded
            if images is None:
                continue
            count.add([place for place in batch if files[place[1]] in decoded], lengths)
            done += decoded
            with common.autocast(args, processes):
                vectors.append(model(normalized(common.to_device(images, processes), model)).float().cpu())
        notes = json.dumps({"settings": settings, "files": done, "skipped": failed})
        write_file(path, shard_bytes("safetensors", done, torch.cat(vectors), notes))
        skipped += len(failed)
    print(f"naflex: embedded {count}; {skipped} skipped")


def main(argv: list[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a classifier on a folder with one subfolder a class")
    embedding = commands.add_parser("embed", help="one vector an image, in shards of safetensors")
    for command in (training, embedding):
        add = command.add_argument
        add("data", type=Path, help="folder of JPEG, PNG and WebP files")
        add("--model", required=True, help="a NaFlexViT of timm by name, or a folder with its config.json")
        add("--tokens", type=positive, default=8192, metavar="N", help="patches of a batch, at most (%(default)s)")
        add("--max-tokens", type=positive, default=576, metavar="N", help="patches of an image, at most (%(default)s)")
    common.add_run_options(training, learning_rate=3e-4, warm_up=500)
    add = training.add_argument
    add("--val", type=Path, help="such a folder, to be classified in the end")
    add("--model-kwargs", action=KeyValues, nargs="+", default={}, metavar="KEY=VALUE", help="changes to the model")
    add("--pretrained", action="store_true", help="begin with timm's weights, which may be downloaded")
    add("--steps", type=positive, default=10000, metavar="N", help="of the optimizer, AdamW (%(default)s)")
    add("--weight-decay", type=number(float, 0), default=0.05, metavar="RATE", help="(%(default)s)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror a random half of the images")
    common.add_machine_options(embedding)
    embedding.set_defaults(parallel="ddp")
    embedding.add_argument("--out", type=Path, required=True, help="folder for the shards")
    embedding.add_argument("--shard-size", type=positive, default=4096, metavar="N", help="images a file (%(default)s)")
    args = parser.parse_args(argv)
    with common.one_line_errors("naflex"):
        {"train": train, "embed": embed}[args.command](args, common.start_processes())


if __name__ == "__main__":
    main()
