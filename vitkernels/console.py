"""What the commands say: errors that a user can act on, tables, and progress. Pretty where rich is installed."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence

try:
    import rich.console
    import rich.progress
    import rich.table
except ImportError:
    rich = None


class UserError(Exception):
    """Something that the user can put right; its text is one line, and is all that is shown."""


def one_line(error: BaseException) -> str:
    """Return the first line of ``error``'s text, or the name of its class where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def warn(text: str) -> None:
    """Tell of something that goes on otherwise than was asked."""
    print(f"vitkernels: warning: {text}", file=sys.stderr)


def near(name: str, names: Iterable[str]) -> str:
    """Return ``; did you mean …?`` with what is like ``name`` among ``names``, or nothing."""
    alike = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {', '.join(alike)}?" if alike else ""


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print ``rows`` under ``header``."""
    rows = list(rows)
    # Where no terminal says how wide it is, rich would cut at 80 columns.
    if rich is None or not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = rich.table.Table(*header, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    # Names of models and classes are text, not rich's markup.
    rich.console.Console(markup=False, highlight=False).print(table)


def track(items: Iterable, text: str, total: int | None = None) -> Iterator:
    """Yield ``items``, ``total`` or ``len(items)`` of them, while a progress bar, or one plain line, says how far."""
    if rich is None:
        print(f"{text} …", file=sys.stderr, flush=True)
        yield from items
        return
    console = rich.console.Console(stderr=True, markup=False)
    yield from rich.progress.track(items, description=text, total=total, console=console, transient=True)


def busy(text: str) -> contextlib.AbstractContextManager:
    """Say ``text`` while something of unknown length goes on."""
    if rich is None:
        print(f"{text} …", file=sys.stderr, flush=True)
        return contextlib.nullcontext()
    return rich.console.Console(stderr=True, markup=False).status(f"{text} …")


def import_timm():
    """Return timm.

    Raises:
        UserError: timm, or the torchvision that it needs, cannot be imported; the message says what to install.
    """
    try:
        import timm
        import timm.data
        import timm.layers
        import timm.models.vision_transformer
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision, built for another torch
        import torch

        raise UserError(
            f"timm cannot be imported ({one_line(error)}); install timm and the torchvision that belongs to "
            f"torch {torch.__version__}: pip install timm torchvision"
        ) from error
    return timm
