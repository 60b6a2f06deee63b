"""Write docs/cost.md: what a billion images cost, estimated from the times of ``vitkernels inspect --time``.

    python docs/make_cost.py

The script compiles each model's block and runs some of its programs on the emulated GPU, which takes some minutes.
Nothing is measured. With --keep it takes the blocks' times from the page as it is, and writes the rest anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import torch

from vitkernels.tools.aot import block_time
from vitkernels.tools.aot.chips import CHIPS
from vitkernels.tools.console import import_timm
from vitkernels.tools.tables import Table, markdown_table

PAGE = Path(__file__).with_name("cost.md")
GPU = "H100"
CHIP = CHIPS[GPU]
# By title: timm's name, and the images a GPU takes at once.
MODELS = {
    "ViT-B/16": ("vit_base_patch16_224", 256),
    "ViT-L/16": ("vit_large_patch16_224", 128),
    "ViT-H/14": ("vit_huge_patch14_224", 64),
    "DINOv3 ViT-L/16": ("vit_large_patch16_dinov3", 128),
}
GPUS = (1, 8, 64, 256, 1024)
BILLION = 1e9

NODE = 8  # GPUs with NVLink between them, each with a network card
NVLINK, NETWORK = 450.0, 50.0  # GB/s in one direction, a GPU
REACHED = 0.8
# By NCCL's protocol: share of the bandwidth, and µs of a collective, of a step within a node, and of one between nodes.
PROTOCOLS = {"LL128": (0.92, 14.0, 1.9, 4.0), "Simple": (1.0, 8.4, 3.4, 14.0)}
GATHERED, REDUCED = 2, 4  # bytes a parameter: gathered in bf16, gradients reduced in fp32
UPDATED = (
    28  # bytes a parameter that AdamW in fp32 reads (weight, gradient, two moments) and writes (all but the gradient)
)
WATTS = 10200 / NODE
DOLLARS = 3.90  # an hour of a GPU

TENSOR = CHIP.rates.tensor["bf16"] * CHIP.reach["tensor"]  # TFLOP/s
DRAM = CHIP.rates.dram * CHIP.reach["dram"]  # TB/s
LATENCIES = "; ".join(
    f"{name} {base} + {within} a step within a node + {across} a step between nodes, at {share:.0%} of the bandwidth"
    for name, (share, base, within, across) in PROTOCOLS.items()
)
# What it is, what it is taken as, and the source.
ASSUMPTIONS = [
    (
        "a block",
        "`vitkernels inspect --time`, accelerated, in bf16",
        "[the compiler's report](compiler-report.md), which says what that leaves out",
    ),
    (
        "patch embedding, head",
        f"FLOPs at {TENSOR:.0f} TFLOP/s or bytes at {DRAM:.2f} TB/s, whichever takes longer, and a launch",
        "the rates of `vitkernels inspect --time`, which it prints with their sources",
    ),
    (
        "AdamW",
        f"{UPDATED} bytes a parameter, each GPU its shard, at {DRAM:.2f} TB/s",
        "counted: weight, gradient and two moments in fp32 are read, all but the gradient written",
    ),
    (
        "FSDP2",
        "a unit for each block and one for the rest; weights are gathered in bf16 for the forward, and for a block "
        "again for the backward; gradients are reduced in fp32",
        "PyTorch's `fully_shard` on each block and the model, `MixedPrecisionPolicy(torch.bfloat16, torch.float32)`",
    ),
    (
        "overlap",
        "a block's collectives hide behind the kernels of another as far as they are shorter, and slow nothing down",
        "assumed; a real overlap is worse",
    ),
    (
        "NVLink",
        f"{NVLINK:.0f} GB/s a GPU and direction, between {NODE} GPUs",
        "NVIDIA's H100 data sheet: 900 GB/s in both directions",
    ),
    (
        "InfiniBand",
        f"{NETWORK:.0f} GB/s a GPU and direction, a card for each GPU",
        "NVIDIA's DGX H100 user guide: eight ConnectX-7 of 400 Gb/s",
    ),
    ("share of both that is reached", f"{REACHED:.0%}", "assumed"),
    (
        "a collective",
        "a ring: (n − 1)/n of the bytes at the slower of NVLink and a node's cards together, and µs of latency: "
        f"{LATENCIES}; the faster of the two",
        "NCCL's own model: src/graph/tuning.cc",
    ),
    ("reading images, the host, failures, idle GPUs", "nothing", "assumed"),
    (
        "power",
        f"{WATTS:,.0f} W a GPU, all the time; cooling is left out",
        "NVIDIA's DGX H100 user guide: 10.2 kW at most, for eight",
    ),
    (
        "price",
        f"${DOLLARS:.2f} an hour of a GPU",
        "AWS P5 on demand as costnimbus.com listed it in March 2026, where others ask $1.50 to $7",
    ),
]

TEXT = """\
# Cost on paper

**Every figure here is an estimate; nothing was timed, and nothing has run on a GPU.** What do a billion images cost on
{gpu}s? The blocks' times are those of `vitkernels inspect --time`, with their bias for our kernels. The rest follows
from the assumptions below; `docs/make_cost.py` writes this page, and is the place to change one.

## Assumptions

{assumptions}

## Estimated time of the blocks

Of an accelerated block, in µs, for the images that a GPU takes at once. Whether training on so many fits into its
memory was not checked.

{blocks}

## Inference, estimated

Each GPU has a copy of the model and works alone: a thousand are a thousand times as fast, at the same cost an image.

{inference}

## Training, estimated

FSDP2 over all GPUs; the batch grows with them. *Of linear* is the speed over that of one GPU times their number; above
100 % a GPU's share of AdamW's work is smaller. A ring over many GPUs waits for its latency. Where that shows, shard
within a node and replicate across nodes (`fully_shard` on a mesh of two dimensions), or use fewer GPUs.

{training}
"""


@dataclasses.dataclass(frozen=True)
class Model:
    """What the estimate reads of a model.

    Attributes:
        batch: Images that a GPU takes at once.
        depth: Blocks.
        block_parameters, other_parameters: Parameters of one block, and of all that is no block.
        patch_flops, head_flops: Of the products outside the blocks, an image.
        io_bytes: Of the images read and the tokens written by the patch embedding in bf16, an image.
        inference, forward, backward: µs of one block.
    """

    batch: int
    depth: int
    block_parameters: int
    other_parameters: int
    patch_flops: float
    head_flops: float
    io_bytes: float
    inference: float
    forward: float
    backward: float

    @property
    def parameters(self) -> int:
        return self.depth * self.block_parameters + self.other_parameters


def describe(name: str, batch: int, times: tuple[float, float, float]) -> Model:
    """Return timm's model ``name`` with the µs of its block: inference, forward and backward."""
    timm = import_timm()
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
    patches, width = model.patch_embed.num_patches, model.embed_dim
    block = sum(p.numel() for p in model.blocks[0].parameters())
    everything = sum(p.numel() for p in model.parameters())
    pixels = 3 * model.patch_embed.img_size[0] * model.patch_embed.img_size[1]
    return Model(
        batch,
        len(model.blocks),
        block,
        everything - len(model.blocks) * block,
        2 * pixels * width,  # each pixel meets each channel of its patch's token
        2 * width * model.num_classes,
        2 * (pixels + patches * width),
        *times,
    )


def measure(name: str, batch: int) -> tuple[float, float, float]:
    """Return the estimated µs of a block, of ``vitkernels inspect --time``: inference, forward and backward."""
    phases = block_time.estimate_blocks(name, batch, [GPU])[GPU]["vitkernels"]
    return tuple(round(sum(e.us for e in phases[phase]), 1) for phase in block_time.PHASES)


def collective(size: float, n: int) -> float:
    """Return the µs of an all-gather or reduce-scatter of ``size`` bytes, all shards together, over ``n`` GPUs."""
    if n == 1:
        return 0.0
    nodes = -(-n // NODE)
    bandwidth = (NVLINK if nodes == 1 else min(NVLINK, NODE * NETWORK)) * REACHED * 1e3  # bytes a µs
    between = nodes - 1
    return min(
        base + (n - 1 - between) * within + between * across + size * (n - 1) / n / (bandwidth * share)
        for share, base, within, across in PROTOCOLS.values()
    )


def outside(model: Model, *, training: bool) -> float:
    """Return the µs of the patch embedding and the head; the images get no gradient."""
    flops = model.patch_flops * (2 if training else 1) + model.head_flops * (3 if training else 1)
    moved = model.io_bytes * (2 if training else 1)
    products = flops / (TENSOR * 1e6)
    return max(products, moved / (DRAM * 1e6)) * model.batch + block_time.LAUNCH_US


def update(model: Model, n: int) -> float:
    """Return the µs of AdamW on a GPU's shard."""
    return model.parameters * UPDATED / n / (DRAM * 1e6)


def inference_us(model: Model) -> float:
    """Return the µs of a batch on one GPU."""
    return model.depth * model.inference + outside(model, training=False)


def training_us(model: Model, n: int) -> tuple[float, float]:
    """Return the µs of a step on ``n`` GPUs, and how many of them the GPUs only communicate."""
    gather = collective(model.block_parameters * GATHERED, n)
    reduce = collective(model.block_parameters * REDUCED, n)
    exposed = model.depth * (max(gather - model.forward, 0.0) + max(gather + reduce - model.backward, 0.0))
    # Nothing hides the first gather and the last reduction, nor those of the unit of what is no block.
    exposed += gather + reduce
    exposed += collective(model.other_parameters * GATHERED, n) + collective(model.other_parameters * REDUCED, n)
    computed = model.depth * (model.forward + model.backward) + outside(model, training=True) + update(model, n)
    return computed + exposed, exposed


def figure(x: float) -> str:
    """Return ``x`` with three digits that count."""
    return f"{float(f'{x:.3g}'):,.0f}" if x >= 100 else f"{x:.3g}"


def costs(images_a_second: float, n: int) -> list[str]:
    """Return hours, megajoules and dollars of a billion images on ``n`` GPUs."""
    seconds = BILLION / images_a_second
    return [figure(seconds / 3600), figure(seconds * n * WATTS / 1e6), figure(seconds / 3600 * n * DOLLARS)]


COSTS = ["hours a billion", "MJ a billion", "$ a billion"]
BLOCKS = ["model", "timm's name", "images", "inference", "training, forward", "training, backward"]


def page(times: dict[str, tuple[float, float, float]]) -> str:
    """Return the page for the µs of each model's block, by title."""
    models = {title: describe(*MODELS[title], times[title]) for title in MODELS}
    blocks, inference, training = [], [], []
    for title, model in models.items():
        name, batch = MODELS[title]
        blocks.append([title, f"`{name}`", str(batch), *(f"{us:.1f}" for us in times[title])])
        speed = model.batch / inference_us(model) * 1e6
        inference.append([title, figure(speed), *costs(speed, 1)])
        one = model.batch / training_us(model, 1)[0]
        for n in GPUS:
            us, exposed = training_us(model, n)
            speed = n * model.batch / us * 1e6
            linear = f"{100 * model.batch / us / one:.0f} %"
            row = [title, f"{n:,}", figure(us / 1e3), figure(exposed / 1e3), figure(speed), linear]
            training.append([*row, *costs(speed, n)])
    training_header = [
        "model",
        "GPUs",
        "ms a step",
        "of it communication alone",
        "images a second",
        "of linear",
        *COSTS,
    ]
    return TEXT.format(
        gpu=GPU,
        assumptions=markdown_table(Table(["what", "taken as", "source"], ASSUMPTIONS, words=3)),
        blocks=markdown_table(Table(BLOCKS, blocks, words=2)),
        inference=markdown_table(Table(["model", "images a second and GPU", *COSTS], inference)),
        training=markdown_table(Table(training_header, training)),
    )


def read_times(text: str) -> dict[str, tuple[float, float, float]]:
    """Return the blocks' times in the page ``text``."""
    rows = re.findall(r"^\| (.+?) \| `\w+` \| \d+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    return {title: (float(a), float(b), float(c)) for title, a, b, c in rows}


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="take the blocks' times from the page")
    kept = read_times(PAGE.read_text(encoding="utf-8")) if parser.parse_args().keep else {}
    times = {title: kept[title] if kept else measure(*of) for title, of in MODELS.items()}
    PAGE.write_text(page(times), encoding="utf-8")


if __name__ == "__main__":
    main()
