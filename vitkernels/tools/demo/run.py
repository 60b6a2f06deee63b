"""``vitkernels demo``: classify held-out digits with PyTorch and with the kernels."""

from __future__ import annotations

from pathlib import Path

from vitkernels.tools.demo import measure
from vitkernels.tools.demo.attention import class_token_attention, position_similarity
from vitkernels.tools.demo.digits import load_digits, load_model
from vitkernels.tools.demo.figure import draw_digits

EMULATED_IMAGES = 16


def run_demo(out: Path) -> None:
    """Classify the held-out digits, print a comparison of plain and accelerated model, and draw ``out``.

    Raises:
        ImportError: A package is missing.
        UserError: The requested backend cannot run, or ``out`` cannot be written.
    """
    device = measure.pick_device()
    no_kernels = measure.why_no_kernels(device)
    model = load_model().to(device)
    _, digits = load_digits()
    images = digits.images.to(device)
    print(f"{len(images)} held-out handwritten digits on {measure.device_name(device)}:")

    truth = measure.fp64_logits(model, images)
    runs = {"plain": measure.run_torch(model, images, truth)}
    if no_kernels is None:
        few = images if device.type != "cpu" else images[:EMULATED_IMAGES]
        runs["accelerated"] = measure.run_kernels(model, few, truth)
    measure.print_runs(runs, digits.labels)
    if no_kernels is not None:
        print(f"The kernels did not run: {no_kernels}")
    elif device.type == "cpu":
        print(
            f"This machine has no GPU: an emulated one ran the kernels on {EMULATED_IMAGES} of the images.\n"
            "This shows that their results are right. Its images/s is no performance figure."
        )

    logits = runs["plain"].logits
    right = (logits.argmax(-1) == digits.labels).sum().item()
    draw_digits(
        out,
        digits.images,
        digits.labels,
        logits,
        class_token_attention(model, images),
        position_similarity(model),
        f"{len(images)} held-out digits, {right} right ({100 * right / len(images):.1f} %)",
    )
    print(f"Wrote {out}")
