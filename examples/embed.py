"""Turn a folder of images into embeddings with a Vision Transformer of timm: one vector an image.

    python examples/embed.py photos --out embeddings --model vit_base_patch16_224 --pretrained
    torchrun --nproc-per-node 8 examples/embed.py photos --out embeddings --model vit_base_patch16_224 --pretrained

The images, sorted by name, are cut into shards of a fixed size. A process takes every nth shard and writes it whole or
not at all. No batch crosses a shard, and each is padded to one size. So a run that was stopped goes on by the same
command, also with another number of processes, and ends with the same files.

An image that cannot be decoded is named on stderr and in its shard, and skipped; delete the shard to try again. Any
other error is one line and exit status 1, and the shards written so far stay.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import vitkernels
from vitkernels.models.weights import read_weights
from vitkernels.tools.console import UserError, check_can_fill, import_timm, one_line, track, write_file
from vitkernels.tools.demo.image import open_image
from vitkernels.tools.names import build, resolve

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
KEY = "embed"  # of a shard's metadata: a second key would come in random order, and change the file's bytes
RANK, PROCESSES, LOCAL_RANK, LOCAL_PROCESSES = (
    int(os.environ.get(name, default))  # set by torchrun
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
)


class Batch(NamedTuple):
    """What a worker hands over: the images that it decoded, (n, 3, Y, X) in uint8, and why not the others."""

    files: list[str]
    pixels: Tensor | None
    failed: dict[str, str | UserError]


class Images(Dataset):
    """Decodes images: a name, and the pixels (3, Y, X) in uint8, or why there are none."""

    def __init__(self, folder: Path, files: list[str], transform):
        self.folder, self.files, self.transform = folder, files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str | UserError]:
        file = self.files[index]
        try:
            return file, self.transform(open_image(self.folder / file))
        except Exception as error:  # also of the transform: an image may be too narrow to be resized
            # If the system cannot read one file, the disk may be gone and all would be skipped: that ends the run.
            unread = isinstance(error.__cause__, OSError) and error.__cause__.errno is not None
            return file, UserError(one_line(error)) if unread else one_line(error)


def collate(items: list[tuple[str, Tensor | str | UserError]]) -> Batch:
    """Part the decoded images from the others."""
    decoded = {file: pixels for file, pixels in items if isinstance(pixels, Tensor)}
    failed = {file: why for file, why in items if file not in decoded}
    return Batch(list(decoded), torch.stack([*decoded.values()]) if decoded else None, failed)


def leave_interrupts(worker: int) -> None:
    """Let Ctrl-C end the main process only, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def list_images(folder: Path) -> list[str]:
    """Return the images below ``folder``, relative to it and sorted; links to folders are not followed."""

    def stop(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {error.strerror}") from error

    files = [Path(parent) / name for parent, _, names in os.walk(folder, onerror=stop) for name in names]
    found = sorted(f.relative_to(folder).as_posix() for f in files if f.suffix.lower() in SUFFIXES and f.is_file())
    if not found:
        raise UserError(f"{folder} holds no images; expected files that end in {', '.join(SUFFIXES)}")
    for file in found:
        if file.encode(errors="replace").decode() != file:  # Parquet could not hold it
            raise UserError(f"{folder} holds {file!a}, a name that is not in UTF-8: rename it")
    return found


def load_model(name: str, checkpoint: Path | None) -> tuple[nn.Module, str]:
    """Build timm's model ``name`` without its head, with its pretrained weights or those at ``checkpoint``.

    Returns:
        The model, in eval mode, and a hash of its weights.
    """
    model, _ = build(resolve(name, may_download=True).for_timm, weights=checkpoint is None, num_classes=0)
    if checkpoint is not None:
        heads = model.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        try:
            state = read_weights(checkpoint)
            model.load_state_dict({key: value for key, value in state.items() if not key.startswith(heads)})
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{checkpoint} cannot be loaded into {name}: {one_line(error)}") from error
    hashed = hashlib.sha256()
    for key, value in model.state_dict().items():
        hashed.update(key.encode())
        hashed.update(value.detach().contiguous().flatten().view(torch.uint8).numpy())
    return model.eval(), hashed.hexdigest()


def shard_bytes(form: str, files: list[str], embeddings: Tensor, notes: str) -> bytes:
    """Return a shard as a file's content: ``embeddings`` (n, C) in fp32, and ``notes``, which is JSON."""
    if form == "safetensors":
        from safetensors.torch import save

        return save({"embeddings": embeddings}, metadata={KEY: notes})
    import pyarrow
    import pyarrow.parquet

    vectors = pyarrow.FixedSizeListArray.from_arrays(embeddings.flatten().numpy(), embeddings.shape[1])
    columns = {"file": pyarrow.array(files, pyarrow.string()), "embedding": vectors}
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns, metadata={KEY: notes}), sink)
    return sink.getvalue().to_pybytes()


def read_settings(path: Path) -> dict:
    """Return the settings that the shard at ``path`` was made with."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                notes = file.metadata()[KEY]
        else:
            import pyarrow.parquet

            notes = pyarrow.parquet.read_schema(path).metadata[KEY.encode()]
        return json.loads(notes)["settings"]
    except Exception as error:  # each reader has its own errors for invalid bytes
        raise UserError(f"{path} is no whole shard of this program ({one_line(error)}): delete or move it") from error


def check_same_run(out: Path, form: str, settings: dict[str, str | int]) -> None:
    """Refuse a folder whose shards were made with other settings: the two would be mixed."""
    for path in sorted(path for path in out.glob(f"embeddings-*.{form}") if path.is_file()):
        made_with = read_settings(path)
        for key, value in settings.items():
            if made_with.get(key) != value:
                was = f"{key} {made_with.get(key)!r}, and this run has {value!r}"
                raise UserError(f"{path} was made with {was}: give the same images and options, or another --out")


def embed(args: argparse.Namespace) -> None:
    """Embed what is missing.

    Raises:
        UserError: The images, the model or the output stand in the way; the text says how.
    """
    if args.format == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(f"--format parquet needs pyarrow ({one_line(error)}): pip install pyarrow") from error
    files = list_images(args.images)
    check_can_fill(args.out)
    timm = import_timm()
    on_gpu = torch.cuda.is_available()
    device, dtype = (f"cuda:{LOCAL_RANK}", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model, weights = load_model(args.model, args.checkpoint)
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False, normalize=False)  # returns uint8

    # Whatever may change a bit of a shard, except what is in the images: only their names are compared.
    settings = {"model": args.model, "weights": weights, "preprocessing": str(config), "dtype": str(dtype)}
    settings |= {"batch size": args.batch_size, "shard size": args.shard_size, "number of images": len(files)}
    settings["names of images"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    check_same_run(args.out, args.format, settings)
    everything = range(len(files))
    shards = [everything[i : i + args.shard_size] for i in everything[:: args.shard_size]]
    names = (f"embeddings-{i:05}-of-{len(shards):05}.{args.format}" for i in range(1, len(shards) + 1))
    mine = [(args.out / name, shard) for name, shard in zip(names, shards, strict=True)][RANK::PROCESSES]
    todo = {
        path: [shard[i : i + args.batch_size] for i in range(0, len(shard), args.batch_size)]
        for path, shard in mine
        if not path.is_file()
    }
    loader = DataLoader(
        Images(args.images, files, transform),
        batch_sampler=[*itertools.chain(*todo.values())],
        num_workers=args.workers,
        collate_fn=collate,
        worker_init_fn=leave_interrupts,
        pin_memory=on_gpu,
    )
    swapped = len(vitkernels.accelerate(model.to(device, dtype)).swapped)
    normalize = config["mean"], config["std"]  # within the graph
    graphed = vitkernels.compile_inference(model, batch_sizes=[args.batch_size], normalize=normalize)
    embedded = skipped = 0
    # Without a GPU, compile_inference calls the model itself, if the backend is named.
    with vitkernels.use_backend("torch" if not on_gpu and vitkernels.backend() == "auto" else vitkernels.backend()):
        one = graphed(torch.zeros(1, *config["input_size"], dtype=torch.uint8))  # also captures the graph
        if not isinstance(one, Tensor) or one.ndim != 2:
            raise UserError(f"{args.model} does not return one vector an image")
        batches = iter(track(loader, "Embedding", len(loader)) if RANK == 0 else loader)
        for path, shard in todo.items():
            done, vectors, failed = [], [one[:0].float().cpu()], {}
            for batch in itertools.islice(batches, len(shard)):
                for why in batch.failed.values():
                    if isinstance(why, UserError):
                        raise why
                    print(f"embed: skipped: {why}", file=sys.stderr)
                done += batch.files
                failed |= batch.failed
                if batch.pixels is not None:
                    vectors.append(graphed(batch.pixels).float().cpu())
            notes = json.dumps({"settings": settings, "files": done, "skipped": failed})
            write_file(path, shard_bytes(args.format, done, torch.cat(vectors), notes))
            embedded += len(done)
            skipped += len(failed)
    found = f"{len(mine) - len(todo)} of {len(mine)} shards were there"
    print(f"embed: {embedded} images embedded, {skipped} skipped; {found}; {swapped} modules accelerated")


def positive(text: str) -> int:
    """Read a whole number from 1 to 65,536; a shard's names must fit into the header of a safetensors file."""
    if not text.isdecimal() or not 1 <= int(text) <= 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 65536")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, embed, and turn errors into one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of JPEG, PNG and WebP files, searched with its subfolders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--model", required=True, help="a model of timm by name, or a folder with its config.json")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="the model's own weights, which may be downloaded")
    weights.add_argument("--checkpoint", "--weights", type=Path, metavar="FILE", help="a state dict or checkpoint")
    parser.add_argument("--format", choices=("safetensors", "parquet"), default="safetensors", help="(%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images at once (%(default)s)")
    parser.add_argument("--shard-size", type=positive, default=4096, metavar="N", help="images a file (%(default)s)")
    cores = max(1, len(os.sched_getaffinity(0)) // LOCAL_PROCESSES)
    parser.add_argument("--workers", type=positive, default=cores, metavar="N", help="that decode (%(default)s)")
    args = parser.parse_args(argv)
    again = "the same command goes on from here"
    try:
        embed(args)
    except UserError as error:
        sys.exit(f"embed: {error}")
    except KeyboardInterrupt:
        sys.exit(f"embed: interrupted: {again}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"embed: the GPU's memory is full ({one_line(error)}): give a smaller --batch-size and another --out")
    except RuntimeError as error:  # PyTorch raises it wherever the main process is when the worker dies
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"embed: a worker that decodes images died ({one_line(error)}): {again}")


if __name__ == "__main__":
    main()
