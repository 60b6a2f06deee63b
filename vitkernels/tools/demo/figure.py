"""The pictures: predictions, the class token's attention, and the similarity of position embeddings."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from vitkernels.tools.console import write_file

INK, FAINT, RIGHT, WRONG = "#22252b", "#6b7280", "#2f6f9f", "#c8372d"
HEAT = "magma"
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.edgecolor": "#c9cdd4",
    "xtick.color": FAINT,
    "ytick.color": INK,
}


def draw_digits(
    path: Path, images: Tensor, labels: Tensor, logits: Tensor, attention: Tensor, similarity: Tensor, title: str
) -> None:
    """Write the demo's picture to ``path``.

    Args:
        path: A PNG.
        images: (n, 1, 8, 8), from -1 to 1.
        labels: (n,).
        logits: (n, 10).
        attention: (n, H, rows, columns), see :func:`vitkernels.tools.demo.attention.class_token_attention`.
        similarity: (rows, columns, rows, columns).
        title: Title of the whole picture.
    """
    confidence, predicted = logits.softmax(-1).max(-1)
    wrong = (predicted != labels).nonzero().flatten().tolist()
    one_each = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    shown = _shown(wrong, len(labels), 30)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 8.4), dpi=150)
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
        figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.2, 1))
        _heading(top, "Predictions, with their confidence; mistakes in red with the true digit")
        for ax, i in zip(top.subplots(3, 10).flat, shown, strict=True):
            _show(ax, images[i, 0].numpy(), cmap="gray_r")
            miss = i in wrong
            text = f"{predicted[i]}, not {labels[i]}" if miss else f"{predicted[i]}"
            ax.set_title(
                f"{text}  {_percent(confidence[i])}",
                color=WRONG if miss else INK,
                fontweight="bold" if miss else "normal",
                fontsize=8,
                pad=3,
            )
            if miss:
                _frame(ax, WRONG)
        left, right = bottom.subfigures(1, 2, width_ratios=(1.72, 1))
        _heading(left, "Where the class token looks (last block, mean over heads)")
        for ax, i in zip(left.subplots(2, 5).flat, one_each, strict=True):
            _overlay(ax, (images[i, 0].numpy() + 1) / 2, attention[i].mean(0))
        _heading(right, "Position embeddings: cosine similarity of each to all")
        _similarity(right, right.subplots(), similarity)
        _save(figure, path)


def draw_classification(
    path: Path,
    image: np.ndarray,
    top: list[tuple[str, float]],
    attention: Tensor | None,
    similarity: Tensor | None,
    title: str,
) -> None:
    """Write the picture of one classified image to ``path``.

    Args:
        path: A PNG.
        image: The model's input before normalisation, (Y, X, 3), from 0 to 1.
        top: Names and probabilities, best first.
        attention: (H, rows, columns), or None without a class token.
        similarity: (rows, columns, rows, columns), or None without position embeddings.
        title: Title of the whole picture.
    """
    panels = 2 + (attention is not None) + (similarity is not None)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4 * panels, 4.4), dpi=150)
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
        figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left")
        parts = iter(figure.subfigures(1, panels))
        part = next(parts)
        _heading(part, "What the model saw")
        _show(part.subplots(), image)
        part = next(parts)
        _heading(part, "Top five")
        _bars(part.subplots(), top)
        if attention is not None:
            part = next(parts)
            _heading(part, "Where the class token looks (last block)")
            _overlay(part.subplots(), image, attention.mean(0))
        if similarity is not None:
            part = next(parts)
            _heading(part, "Similarity of position embeddings")
            _similarity(part, part.subplots(), similarity)
        _save(figure, path)


def _shown(wrong: list[int], n: int, count: int) -> list[int]:
    """Return ``count`` of ``n`` indices: mistakes first (up to half), then the first of the rest."""
    wrong = wrong[: count // 2]
    return wrong + [i for i in range(n) if i not in wrong][: count - len(wrong)]


def _percent(p: Tensor | float) -> str:
    return ">99 %" if p > 0.99 else f"{100 * p:.0f} %"


def _heading(part, text: str) -> None:
    part.suptitle(text, fontsize=10, color=FAINT, x=0.012, ha="left")


def _show(ax, image, **options):
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax.imshow(image, **options)


def _frame(ax, colour: str) -> None:
    for spine in ax.spines.values():
        spine.set(visible=True, color=colour, linewidth=1.8)


def _overlay(ax, image: np.ndarray, weights: Tensor) -> None:
    """Show ``image`` (Y, X) or (Y, X, 3), from 0 to 1, with a glow where ``weights`` (rows, columns) are large."""
    scale = max(1, 160 // image.shape[0])
    image = image.repeat(scale, 0).repeat(scale, 1)
    if image.ndim == 2:
        image = image[..., None]
    heat = torch.nn.functional.interpolate(weights[None, None], size=image.shape[:2], mode="bicubic")[0, 0]
    heat = (heat.clamp(min=0) / heat.max()).numpy()
    glow = matplotlib.colormaps[HEAT](heat)[..., :3]
    opacity = 0.85 * heat[..., None]
    _show(ax, (1 - opacity) * 0.8 * image + opacity * (0.85 + 0.15 * image) * glow)


def _similarity(part, ax, similarity: Tensor) -> None:
    """Show one small map per position, arranged like the patches, with thin gaps."""
    rows, columns = similarity.shape[:2]
    scale = max(1, 36 // rows)
    height, width, gap = rows * scale, columns * scale, max(1, rows * scale // 12)
    tiles = similarity.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    tiles = torch.nn.functional.pad(tiles, (0, gap, 0, gap), value=float("nan"))
    mosaic = tiles.permute(0, 2, 1, 3).reshape(rows * (height + gap), columns * (width + gap))[:-gap, :-gap]
    low = similarity.min().item()
    shown = _show(ax, mosaic.numpy(), cmap=HEAT, vmin=low, vmax=1, interpolation="nearest")
    bar = part.colorbar(shown, ax=ax, shrink=0.8, pad=0.02, ticks=(low, 0, 1), format="%.1f")
    bar.outline.set_visible(False)


def _bars(ax, top: list[tuple[str, float]]) -> None:
    names, values = zip(*reversed(top), strict=True)
    ax.barh(names, values, color=[FAINT] * (len(top) - 1) + [RIGHT], height=0.6)
    for y, value in enumerate(values):
        ax.text(value + 0.015, y, f"{100 * value:.1f} %", va="center", fontsize=8)
    ax.set_xlim(0, 1.18)
    ax.set_xticks([])
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(length=0)


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_file(path, picture.getvalue())
