"""Train the demo's Vision Transformer on the digits that scikit-learn ships: a few minutes on a CPU.

    python examples/train_digits.py --out vitkernels/tools/demo/digits.safetensors

The 450 held-out digits are read once, after the last epoch; the recipe was chosen on parts of the other 1,347.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitkernels
from vitkernels.models import VisionTransformer
from vitkernels.tools.console import UserError, check_can_write
from vitkernels.tools.demo.digits import fingerprint, load_digits, save_model

CONFIG = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.1,
}
BATCH = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
WARM_UP = 0.05  # share of all steps


def build_model() -> VisionTransformer:
    """Return a new model. Its initial weights are larger than timm's std of 0.02, which suits widths near 1,000."""
    model = VisionTransformer(**CONFIG)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.pos_embed, std=0.2)
    return model


def shift(images: Tensor) -> Tensor:
    """Shift each image (n, 1, 8, 8) by -1, 0 or 1 pixel along each axis, and fill the edge with paper (-1)."""
    n, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(0, 3, (2, n, 1))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def warp(images: Tensor) -> Tensor:
    """Rotate, scale and shear a random half of the images (n, 1, 8, 8) a little; the others stay sharp."""
    n = len(images)
    angle, slant = (math.radians(12) * _symmetric(n) for _ in range(2))
    size = 1 + 0.06 * _symmetric(n)
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = size * angle.cos()
    matrix[:, 0, 1] = slant - angle.sin()
    matrix[:, 1, 0] = angle.sin()
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    # grid_sample pads with zeros: shift the values so that paper is zero.
    warped = F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2) - 1
    return torch.where(torch.rand(n, 1, 1, 1) < 0.5, warped, images)


def _symmetric(n: int) -> Tensor:
    return 2 * torch.rand(n) - 1


def train(epochs: int, seed: int) -> VisionTransformer:
    """Train for ``epochs`` with AdamW, a linear warm-up and a cosine schedule; return the final model."""
    torch.manual_seed(seed)
    digits, _ = load_digits()
    model = build_model()
    steps_an_epoch = len(digits.labels) // BATCH
    steps = epochs * steps_an_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(digits.labels))
        total = 0.0
        for step in range(steps_an_epoch):
            batch = order[step * BATCH : (step + 1) * BATCH]
            logits = model(shift(warp(digits.images[batch])))
            loss = F.cross_entropy(logits, digits.labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 10 == 0 or epoch in (1, epochs):
            seconds = time.perf_counter() - start
            print(f"epoch {epoch:3d}/{epochs}  loss {total / steps_an_epoch:.4f}  {seconds:5.1f} s", flush=True)
    return model.eval()


def main() -> None:
    """Train, evaluate once on the held-out digits, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("digits.safetensors"), help="checkpoint (%(default)s)")
    parser.add_argument("--epochs", type=int, default=160, help="passes over the 1,347 digits (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and shifts (%(default)s)")
    args = parser.parse_args()
    try:
        check_can_write(args.out)  # fail now, not after minutes of training
    except UserError as error:
        parser.error(str(error))
    with vitkernels.use_backend("torch"):
        model = train(args.epochs, args.seed)
        _, held_out = load_digits()
        with torch.inference_mode():
            right = (model(held_out.images).argmax(-1) == held_out.labels).sum().item()
    print(f"held out: {right} of {len(held_out.labels)} right, {100 * right / len(held_out.labels):.2f} %")
    notes = {"epochs": str(args.epochs), "seed": str(args.seed), "held_out": fingerprint(held_out)}
    save_model(model, CONFIG, args.out, trained_by="examples/train_digits.py", **notes)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
