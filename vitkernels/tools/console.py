"""The commands' input and output: errors that a user can act on, files, tables and progress (rich if installed)."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vitkernels.tools import _interrupt

try:
    import rich.console
    import rich.progress
    import rich.table
except ImportError:
    rich = None


class UserError(Exception):
    """An error that the user can correct. Its text is one line, and the command shows nothing else."""


def one_line(error: BaseException) -> str:
    """Return the first line of ``error``'s text (and the next one after a colon), or its class's name if empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 1 + lines[0].endswith(":")]) if lines else type(error).__name__


def warn(text: str) -> None:
    """Print a warning: the command goes on, but not as the user asked."""
    print(f"vitkernels: warning: {text}", file=sys.stderr)


_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # packages that pip installs under another name


def not_imported(error: ImportError, extra: str) -> str:
    """Return ``cannot be imported``, the reason, and what to install: the package, or an extra of vitkernels."""
    package = (error.name or "").partition(".")[0]
    words = [_DISTRIBUTIONS.get(package, package)] if package else []
    if words and not isinstance(error, ModuleNotFoundError):
        words.insert(0, "--force-reinstall")  # it is installed, but broken
    each = f"pip install {' '.join(words)}, or " if words else ""
    return f"cannot be imported ({one_line(error)}): {each}install vitkernels with its extra [{extra}]"


def why_not_imported(command: str, error: ImportError, extra: str) -> str:
    """Return in one line which package ``command`` needs.

    Raises:
        ImportError: ``error`` itself, if one of our own modules cannot be imported, which is a bug.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("vitkernels", "benchmarks"):
        raise error
    return f"{command} needs {package or 'a package'}, which {not_imported(error, extra)}"


def near(name: str, names: Iterable[str]) -> str:
    """Return ``; did you mean …?`` with the ``names`` that resemble ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {', '.join(matches)}?" if matches else ""


def write_file(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` whole or not at all: an older file stays until the new one is complete.

    Links and devices are written in place.

    Raises:
        UserError: The file cannot be written.
    """

    def write(to: Path) -> None:
        to.write_text(content, encoding="utf-8") if isinstance(content, str) else to.write_bytes(content)

    try:
        if _is_written_in_place(path):
            write(path)
            return
        part = _part(path)
        with _interrupt.writing():
            try:
                write(part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(_why_not_written(path, error)) from error


def check_can_write(path: Path) -> None:
    """Check, before long work, that :func:`write_file` will be able to write ``path``; leave nothing there.

    Raises:
        UserError: It cannot: the folder is missing, ``path`` is a folder, or permission is denied.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not path.exists() or not _is_written_in_place(path):
            part = _part(path.resolve())
            part.touch()
            part.unlink()
    except OSError as error:
        raise UserError(_why_not_written(path, error)) from error


def check_can_fill(folder: Path) -> None:
    """Create ``folder`` if it is missing, and check, before long work, that files can be written there.

    Raises:
        UserError: The folder cannot be created, or files cannot be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is no folder" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise UserError(f"cannot write to {folder}: {why}") from error
    check_can_write(folder / "file")


def _is_written_in_place(path: Path) -> bool:
    """Return whether ``path`` must not be replaced by a new file: a link, or a device such as /dev/stdout."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _why_not_written(path: Path, error: OSError) -> str:
    why = error.strerror if path.parent.is_dir() else f"there is no folder {path.parent}"
    return f"cannot write {path}: {why}"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print ``rows`` under ``header``."""
    rows = list(rows)
    # Without a terminal, rich would cut lines at 80 columns.
    if rich is None or not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = rich.table.Table(*header, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    # With markup=True, rich would read brackets in names of models and classes as markup.
    rich.console.Console(markup=False, highlight=False).print(table)


def track(items: Iterable, text: str, total: int | None = None) -> Iterator:
    """Yield ``items`` (``total``, or ``len(items)``, of them) and show a progress bar; without rich print one line."""
    if rich is None:
        print(f"{text} …", file=sys.stderr, flush=True)
        yield from items
        return
    console = rich.console.Console(stderr=True, markup=False)
    yield from rich.progress.track(items, description=text, total=total, console=console, transient=True)


def busy(text: str) -> contextlib.AbstractContextManager:
    """Show ``text`` while work of unknown length runs."""
    if rich is None:
        print(f"{text} …", file=sys.stderr, flush=True)
        return contextlib.nullcontext()
    return rich.console.Console(stderr=True, markup=False).status(f"{text} …")


def give_blas_one_thread() -> None:
    """Keep NumPy's and PyTorch's BLAS from starting a thread per core in each process.

    BLAS reads these variables once, when NumPy is imported, and PyTorch imports NumPy. So call this before both.
    """
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")


def import_torchvision():
    """Return torchvision, even if its wheel was built for another build of PyTorch (PyPI's wheel is built for CUDA).

    Then its binary cannot be loaded, and the import of its Python code, which is all that timm needs, fails at two
    undefined ops. This function defines the two, without an implementation, for the rest of the process. So only
    commands and tests, which own their process, may call it; ``import vitkernels`` never does.
    """
    global _torchvision_ops
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _torchvision_ops is not None:
            raise
        import torch

        _torchvision_ops = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _torchvision_ops.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


_torchvision_ops = None  # keeps the library alive: its ops disappear with it


def prepare_torchvision() -> None:
    """Call :func:`import_torchvision` and ignore errors, so that a later ``import torchvision`` works if it can."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        import_torchvision()


def import_transformers():
    """Return transformers; prepare torchvision first, which its models import.

    Raises:
        UserError: transformers cannot be imported.
    """
    prepare_torchvision()
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"transformers {not_imported(error, 'hf')}") from error
    return transformers


def import_timm():
    """Return timm; prepare torchvision first (:func:`import_torchvision`).

    Raises:
        UserError: timm, or the torchvision that it needs, cannot be imported; the message says what to install.
    """
    prepare_torchvision()
    try:
        import timm
        import timm.data
        import timm.layers
        import timm.models.vision_transformer
    except ModuleNotFoundError as error:
        raise UserError(f"timm {not_imported(error, 'timm')}") from error
    except (ImportError, OSError, RuntimeError) as error:
        import torch

        raise UserError(
            f"timm cannot be imported ({one_line(error)}): reinstall torchvision from where torch {torch.__version__} "
            "came from, as pip install --force-reinstall --no-deps torchvision, with the same --index-url"
        ) from error
    return timm
