"""What the training examples share: processes, the loop, checkpoints, the log and options; image_data.py has the data.

Everything random is drawn from the seed and from where a run is: an image's augmentation from its epoch and index, a
batch's dropout from its step and process. So a checkpoint holds no state of a random generator and no position in the
data. A run that was killed goes on by the same command and ends with the same weights, on a CPU bit for bit; with
another number of processes or workers, the same to rounding where nothing is dropped.

An error is one line and exit status 1, and the newest whole checkpoint stays.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from image_data import eval_transform, load, seed_of
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

import vitkernels
from vitkernels.tools.console import UserError, check_can_fill, one_line, track, write_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Options that change where and how fast a run computes, but its result by no more than rounding.
FREE = ("data", "val", "out", "workers", "micro_batch", "parallel", "compile", "accelerate", "recompute")
FREE += ("checkpoint_every", "checkpoint", "tensorboard")


class Processes(NamedTuple):
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device


def start_processes() -> Processes:
    """Join the process group that torchrun describes, or make one of this process alone."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **alone)
    return Processes(dist.get_rank(), dist.get_world_size(), device)


class Shares:
    """Which images this process takes, batch by batch: lists of (epoch, index).

    The data set follows itself for ever, each time in another order, and step s takes images [s·B, (s + 1)·B) of that.
    Nothing depends on the number of processes but who takes what.
    """

    def __init__(self, images: int, args: argparse.Namespace, processes: Processes, steps: range):
        self.images, self.args, self.processes, self.steps = images, args, processes, steps
        self.parts = math.ceil(args.batch_size // processes.size / args.micro_batch)  # of a step

    def images_in(self, step: int) -> int:
        """Return how many images all processes take in ``step``."""
        return self.args.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        for step in self.steps:
            first = step * self.args.batch_size
            mine = []
            for place in range(first + self.processes.rank, first + self.args.batch_size, self.processes.size):
                if place // self.images != epoch:
                    epoch = place // self.images
                    shuffle = torch.Generator().manual_seed(seed_of(self.args.seed, epoch))
                    order = torch.randperm(self.images, generator=shuffle)
                mine.append((epoch, int(order[place % self.images])))
            for i in range(0, len(mine), self.args.micro_batch):
                yield mine[i : i + self.args.micro_batch]


def prepare(model: nn.Module, args: argparse.Namespace, processes: Processes) -> nn.Module:
    """Accelerate, recompute, compile and distribute ``model`` as the options say; ``model.blocks`` are its blocks."""
    model.to(processes.device)
    if args.accelerate:
        swapped = len(vitkernels.accelerate(model).swapped)
        if processes.rank == 0:
            print(f"{swapped} modules accelerated")
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[args.dtype], reduce_dtype=torch.float32)
    kept = args.recompute.removeprefix("all-but-")
    context = (
        {} if kept == "all" else {"context_fn": vitkernels.checkpoint_context(kept)} if kept != "nothing" else None
    )
    for i, block in enumerate(model.blocks):
        if context is not None:
            block = model.blocks[i] = checkpoint_wrapper(block, **context)
        if args.compile:
            block.compile()
        if args.parallel == "fsdp":
            fully_shard(block, mp_policy=policy)
    if args.parallel == "fsdp":
        return fully_shard(model, mp_policy=policy)
    return DistributedDataParallel(model) if processes.size > 1 else model


def to_device(batch: Tensor | dict[str, Tensor], processes: Processes):
    """Return a batch, or a dictionary of tensors, on the device."""
    if isinstance(batch, dict):
        return {key: to_device(value, processes) for key, value in batch.items()}
    return batch.to(processes.device, non_blocking=True)


def normalized(images: Tensor, model: nn.Module) -> Tensor:
    """Return ``images``, (n, 3, Y, X) in uint8, in fp32, with the mean and deviation of timm's model."""
    config = getattr(model, "module", model).pretrained_cfg
    mean, std = (torch.tensor(config[key], device=images.device)[:, None, None] for key in ("mean", "std"))
    return (images / 255 - mean) / std


def autocast(args: argparse.Namespace, processes: Processes):
    """Return the context in which the model computes in the dtype of the options."""
    # FSDP2 computes in the dtype of its policy by itself.
    mixed = args.dtype != "fp32" and args.parallel == "ddp"
    return torch.autocast(processes.device.type, DTYPES[args.dtype], enabled=mixed)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the trained parameters in groups for an optimizer; biases, norms, tokens and positions do not decay."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if name.endswith("weight") and parameter.ndim > 1 else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def schedule(step: int, steps: int, warm_up: int, decay: str) -> float:
    """Return the factor of the learning rate at ``step``: it rises over ``warm_up`` steps and then falls towards 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.5 * (1 + math.cos(math.pi * done)) if decay == "cosine" else 1 - done


class Log:
    """``log.csv`` in ``out``, a line a step, and with ``board`` the same for TensorBoard, in ``out/tensorboard``.

    What is there of steps that will be done again, behind those that are ``done``, is removed first.
    """

    COLUMNS = ("loss", "learning_rate", "gradient_norm", "images_per_second")

    def __init__(self, out: Path, done: int, board: bool):
        self.path, self.board = out / "log.csv", None
        lines = self.path.read_text(encoding="utf-8").splitlines()[1:] if self.path.is_file() else []
        # A kill may have cut off the last line; it is of a step after the checkpoint, as that is made later.
        kept = [line for line in lines if line.partition(",")[0].isdecimal() and int(line.partition(",")[0]) <= done]
        write_file(self.path, "".join(f"{line}\n" for line in (",".join(("step", *self.COLUMNS)), *kept)))
        if board:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(out / "tensorboard", purge_step=done + 1)
            except ImportError as error:
                raise UserError(f"--tensorboard: {one_line(error)}: pip install tensorboard") from error
            except OSError as error:
                raise UserError(f"cannot write to {out / 'tensorboard'}: {error.strerror}") from error

    def write(self, step: int, *values: float) -> None:
        """Append what was measured in ``step``, which counts from 1."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(",".join([str(step), *(f"{value:.9g}" for value in values)]) + "\n")
            if self.board is not None:
                for name, value in zip(self.COLUMNS, values, strict=True):
                    self.board.add_scalar(name, value, step)
                self.board.flush()  # or the steps before a checkpoint may be missing behind it
        except OSError as error:
            raise UserError(f"cannot write the log in {self.path.parent}: {error.strerror}") from error


def _whole_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints in ``out``, the newest last."""
    return sorted(path for path in out.glob("step-*") if path.is_dir())


def resume(out: Path, model: nn.Module, optimizer, settings: dict, processes: Processes) -> int:
    """Load the newest checkpoint in ``out``, if there is one, and return how many steps it has behind it.

    Raises:
        UserError: It is of a run with other settings, or cannot be read.
    """
    found = [None]
    if processes.rank == 0:
        for part in out.glob(".step-*"):  # of a run that was killed while it wrote
            shutil.rmtree(part, ignore_errors=True)
        found = [next(iter(reversed(_whole_checkpoints(out))), None)]
    dist.broadcast_object_list(found)
    newest = found[0]
    if newest is None:
        return 0
    try:
        made_with = json.loads((newest / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{newest} is no checkpoint of this program: {one_line(error)}") from error
    for key, value in settings.items():
        if made_with.get(key) != value:
            was = f"{key} {made_with.get(key)!r}, and this run has {value!r}"
            raise UserError(f"{newest} was made with {was}: give the same options, or another --out")
    weights, state = get_state_dict(model, optimizer)
    held = {"model": weights, "optimizer": state}
    try:
        dcp.load(held, checkpoint_id=newest)
    except (dcp.CheckpointException, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{newest} cannot be loaded: {_cause(error)}") from error
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    return int(newest.name.removeprefix("step-"))


def save(out: Path, step: int, model: nn.Module, optimizer, settings: dict, processes: Processes) -> None:
    """Write a checkpoint, whole or not at all, and only then remove the older ones.

    Raises:
        UserError: It cannot be written.
    """
    part, whole = out / f".step-{step:08}", out / f"step-{step:08}"
    weights, state = get_state_dict(model, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=part)
        if processes.rank == 0:
            write_file(part / "settings.json", json.dumps(settings))
            older = _whole_checkpoints(out)
            part.replace(whole)
            for path in older:
                shutil.rmtree(path)
    except (dcp.CheckpointException, OSError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"cannot write {whole}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """Return in one line why a checkpoint failed, from what the failing processes raised."""
    failures = getattr(error, "failures", {})
    return one_line(next(iter(failures.values()))[0] if failures else error)


def train(
    args: argparse.Namespace,
    processes: Processes,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data,
    steps: int,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
    transform: Callable,
    shares: Callable[[range], Shares] | None = None,
    stack: Callable = default_collate,
) -> None:
    """Train ``model``, as :func:`prepare` returned it, from its newest checkpoint to the end.

    Args:
        args: The options of :func:`add_options`.
        processes: This process among all.
        model: The distributed model.
        optimizer: Its optimizer, with the peak learning rate in each group.
        data: As from :func:`open_data`.
        steps: Of the optimizer, from the start of the run.
        loss_of: Returns the sum over images of the loss, of the model, the images and the labels.
        transform, stack: As for :func:`load`; ``transform`` takes a Pillow image.
        shares: Returns, for the steps to be done, the batches; None for :class:`Shares`.

    Raises:
        UserError: What stands in the way: of a checkpoint, the data, the disk, or a loss that is no number.
    """
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings = json.loads(json.dumps(settings | {"number of images": len(data), "steps": steps}))  # as it is read back
    peaks = [group["lr"] for group in optimizer.param_groups]
    done = resume(args.out, model, optimizer, settings, processes)
    log = Log(args.out, done, args.tensorboard) if processes.rank == 0 else None
    todo = range(done, steps)
    shared = Shares(len(data), args, processes, todo) if shares is None else shares(todo)
    batches = load(data, transform, shared, args, stack)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for step in track(todo, "Training") if processes.rank == 0 else todo:
        start = time.perf_counter()
        factor = schedule(step, steps, args.warm_up, args.decay)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        in_step = shared.images_in(step)
        total = torch.zeros((), device=processes.device)
        for part in range(shared.parts):
            images, labels = (to_device(tensors, processes) for tensors in next(batches))
            torch.manual_seed(seed_of(args.seed, step, part, processes.rank))  # of dropout
            # DDP adds up gradients at the last part only. FSDP2 keeps no whole gradients, and so does it at each.
            wait = isinstance(model, DistributedDataParallel) and part < shared.parts - 1
            with model.no_sync() if wait else contextlib.nullcontext():
                with autocast(args, processes):
                    loss = loss_of(model, images, labels) / in_step
                (loss * processes.size).backward()  # both divide by the number of processes
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(trained, args.clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        dist.all_reduce(total)
        if not math.isfinite(total.item() + norm):
            found = f"the loss is {total.item():g} and the gradient's norm {norm:g} at step {step + 1}"
            raise UserError(f"{found}: lower --learning-rate, and give another --out")
        optimizer.step()
        optimizer.zero_grad()
        if log is not None:
            log.write(step + 1, total.item(), factor * peaks[0], norm, in_step / (time.perf_counter() - start))
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == steps:
            save(args.out, step + 1, model, optimizer, settings, processes)


def held_out(
    data, transform: Callable, args: argparse.Namespace, processes: Processes
) -> Iterator[tuple[Tensor | dict[str, Tensor], Tensor, int]]:
    """Yield this process' share of ``data`` in batches on the device: images, labels, and how many of them count.

    All processes must call the model equally often, so a short share is filled up with images that do not count.
    """
    shares = [range(rank, len(data), processes.size) for rank in range(processes.size)]
    mine, longest = shares[processes.rank], len(shares[0])
    places = [(0, i) for i in mine] + [(0, 0)] * (longest - len(mine))
    batches = [places[i : i + args.micro_batch] for i in range(0, longest, args.micro_batch)]
    left = len(mine)
    for images, labels in load(data, transform, batches, args):
        yield to_device(images, processes), to_device(labels, processes), min(left, len(labels))
        left -= min(left, len(labels))


@torch.no_grad()
def print_accuracy(args: argparse.Namespace, processes: Processes, model: nn.Module, data) -> None:
    """Print how many images of ``data`` the model classifies right. All processes must call this."""
    right = torch.zeros((), dtype=torch.int64, device=processes.device)
    model.eval()
    for images, labels, counted in held_out(data, eval_transform(args.img_size), args, processes):
        with autocast(args, processes):
            predicted = model(normalized(images, model)).argmax(-1)
        right += (predicted == labels)[:counted].sum()
    dist.all_reduce(right)
    if processes.rank == 0:
        print(f"held out: {right} of {len(data)} right, {100 * right / len(data):.2f} %")


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return all weights by their plain names, on the CPU of rank 0; elsewhere nothing. All processes must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def export(
    folder: Path, weights: dict[str, Tensor], architecture: str, num_classes: int, like: nn.Module, **model_args
):
    """Write ``model.safetensors`` and the ``config.json`` by which ``timm.create_model("local-dir:…")`` builds it.

    Args:
        folder: Where to.
        weights: By the names that timm's model has with ``num_classes``.
        architecture: The name for timm.
        num_classes: Of the head; 0 if ``weights`` has none.
        like: The model whose images are normalised alike.
        model_args: Further arguments for timm, with ``img_size``.
    """
    from safetensors.torch import save as to_bytes

    images = {key: like.pretrained_cfg[key] for key in ("mean", "std", "first_conv", "classifier")}
    images |= {"input_size": (3, model_args["img_size"], model_args["img_size"]), "crop_pct": 1.0}
    config = {"architecture": architecture, "num_classes": num_classes, "model_args": model_args}
    write_file(folder / "model.safetensors", to_bytes({key: value.contiguous() for key, value in weights.items()}))
    write_file(folder / "config.json", json.dumps(config | {"pretrained_cfg": images}, indent=2))


def label_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over images of the cross-entropy."""
    return F.cross_entropy(model(normalized(images, model)).float(), labels, reduction="sum")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return what reads an int or a float from ``low`` to ``high``."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(
                f"{text!r} is no {name} from {low:g}" + (f" to {high:g}" * (high < math.inf))
            )
        return value

    return read


positive = number(int, 1)


class KeyValues(argparse.Action):
    """Reads ``key=value …``, each value as Python writes it, or else as text."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for text in values:
            key, is_pair, value = text.partition("=")
            if not is_pair:
                parser.error(f"{option_string}: {text!r} is no key=value")
            try:
                pairs[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pairs[key] = value
        setattr(namespace, self.dest, pairs)


def add_options(
    parser: argparse.ArgumentParser, *, img_size: int, batch_size: int, learning_rate: float, warm_up: int
) -> None:
    """Add the options of the examples that train on images of one size."""
    add = parser.add_argument
    add("--data", required=True, metavar="PATH", help="folder of images in one subfolder a class, of WebDataset's .tar "
        "shards, or of datasets.save_to_disk; or digits")  # fmt: skip
    add("--val", metavar="PATH", help="data to be classified in the end (digits: its held-out part)")
    add("--img-size", type=positive, default=img_size, metavar="PIXELS", help="height and width (%(default)s)")
    add(
        "--crop-scale",
        type=number(float, 0.01, 1),
        metavar="SHARE",
        default=0.08,
        help="smallest random crop (%(default)s)",
    )
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror a random half of the images")
    add("--batch-size", type=positive, default=batch_size, metavar="N", help="images a step (%(default)s)")
    add("--micro-batch", type=positive, default=64, metavar="N", help="images at once on a process (%(default)s)")
    add_run_options(parser, learning_rate=learning_rate, warm_up=warm_up)


def add_run_options(parser: argparse.ArgumentParser, *, learning_rate: float, warm_up: int) -> None:
    """Add the options that all training examples have."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoints, log.csv and the trained model")
    add("--tensorboard", action="store_true", help="log for TensorBoard, too, in its folder tensorboard")
    add(
        "--learning-rate",
        type=number(float, 0),
        default=learning_rate,
        metavar="RATE",
        help="at its peak (%(default)s)",
    )
    add("--warm-up", type=number(int, 0), default=warm_up, metavar="STEPS", help="over which it rises (%(default)s)")
    add("--decay", choices=("cosine", "linear"), default="cosine", help="how it falls (%(default)s)")
    add("--clip", type=number(float, 0), default=1.0, metavar="NORM", help="largest norm of the gradient (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and dropout (%(default)s)")
    add("--checkpoint-every", type=positive, default=1000, metavar="STEPS", help="(%(default)s)")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="whole or sharded weights (%(default)s)")
    kept = ("nothing", "all-but-attention", "all-but-linear", "all-but-mlp", "all")
    add("--recompute", choices=kept, default="nothing", help="of a block, in the backward (%(default)s)")
    add("--compile", action="store_true", help="compile each block")
    add_machine_options(parser)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how this machine computes."""
    add = parser.add_argument
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    add("--dtype", choices=DTYPES, default=dtype, help="of activations; weights are fp32 (here %(default)s)")
    add("--accelerate", action=argparse.BooleanOptionalAction, default=True, help="swap vitkernels in")
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--workers", type=number(int, 0), default=cores, metavar="N", help="that decode; 0 for none (%(default)s)")


def check_options(args: argparse.Namespace, processes: Processes) -> None:
    """Refuse options that exclude one another, and a folder that cannot be written, before long work."""
    if args.batch_size % processes.size:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of {processes.size}, the number of processes")
    if processes.rank == 0:
        check_can_fill(args.out)


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn errors into one line and exit status 1."""
    again = "the same command goes on from the newest checkpoint"
    try:
        yield
    except UserError as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted: {again}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{program}: the GPU's memory is full ({one_line(error)}): give a smaller --micro-batch")
    except RuntimeError as error:  # PyTorch raises it wherever the main process is when the worker dies
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"{program}: a worker that decodes images died ({one_line(error)}): {again}")
    # DDP's reducer waits for ever if the group is gone before it. An error's traceback holds it; then leave the group.
    gc.collect()
    dist.destroy_process_group()
