"""The report of a swap: which modules were swapped, and which were not and why."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable

from vitkernels.swap.estimate import Estimate


@dataclasses.dataclass(frozen=True)
class Swapped:
    """One swapped module.

    Attributes:
        module: Its path in the model; "" is the model itself.
        was: The name of its class before.
        now: The ``__qualname__`` of its class after; the class's ``__name__`` does not change.
        precision: ``fp8`` if its products run in FP8, else None.
        reason: Why they do not, if FP8 was asked for and the module has products of its own; else None.
    """

    module: str
    was: str
    now: str
    precision: str | None = None
    reason: str | None = None

    @property
    def runs(self) -> str:
        """What runs now, for a person."""
        said = f"→ {self.now}" + (f" in {self.precision}" if self.precision else "")
        return said if self.reason is None else f"{said}, not in fp8: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Kept:
    """One module that keeps its own forward.

    Attributes:
        module: Its path in the model; "" is the model itself.
        cls: Its class's name.
        reason: Why, for a person.
        known: Whether there is a rule for this class, so that a module of it can be swapped in principle.
        part: Which part of a transformer it is: ``attention``, ``a norm``, ``an MLP``, ``a patch embedding``, judged by
            its class's name or its contents (``swap/_parts.py``); None if it is none of these, or ``known``.
    """

    module: str
    cls: str
    reason: str
    known: bool
    part: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of :func:`vitkernels.accelerate`, ``restore`` or ``explain``.

    Attributes:
        swapped: The swapped modules, in the model's order.
        kept: The modules that keep their own forward, if they hold parameters or have a rule. Children that a swapped
            module reads without calling, such as the Linears of an attention, are in neither list.
    """

    swapped: tuple[Swapped, ...]
    kept: tuple[Kept, ...]
    _estimate: Callable[[], Estimate | None] = dataclasses.field(default=lambda: None, compare=False, repr=False)

    @functools.cached_property
    def estimate(self) -> Estimate | None:
        """The share of the model's time in swapped modules, and the attention providers: see ``swap/estimate.py``.

        Computed at the first access, by running a copy of the model without data. None if that fails, if the size of
        the model's images is unknown, or if the model has been deleted.
        """
        return self._estimate()

    def __getstate__(self) -> dict:
        return vars(self) | {"estimate": self.estimate, "_estimate": None}

    def to_dict(self) -> dict:
        """Return the report as plain data.

        ``{"swapped": [{"module", "was", "now"}], "kept": [{"module", "class", "reason"}], "estimate": {"image",
        "fused_share", "attention": [{"queries", "keys", "head_dim", "calls", "provider", "on_cpu"}]} or None}``; a
        swapped module has "precision" or "reason" too where FP8 was asked for.
        """
        return {
            "swapped": [
                {name: value for name, value in dataclasses.asdict(entry).items() if value is not None}
                for entry in self.swapped
            ],
            "kept": [{"module": k.module, "class": k.cls, "reason": k.reason} for k in self.kept],
            "estimate": None if self.estimate is None else dataclasses.asdict(self.estimate),
        }

    def to_json(self, indent: int | None = 1) -> str:
        """Return :meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def print(self) -> None:
        """Print a table, in colour if rich is installed; the same module of several blocks takes one line."""
        try:
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table
        except ImportError:
            print(self)
            return
        table = Table(title=self._title(), title_justify="left")
        for heading in ("module", "", "class", "runs"):
            table.add_column(heading, justify="right" if not heading else "left", overflow="fold")
        for style, rows in (("green", self._swapped_rows()), ("yellow", self._kept_rows())):
            for module, count, cls, runs in rows:
                table.add_row(escape(module), count, escape(cls), escape(runs), style=style)
            table.add_section()
        console = Console()
        console.print(table)
        if self.estimate is not None:
            console.print(str(self.estimate), markup=False, highlight=False)

    def __str__(self) -> str:
        estimate = "" if self.estimate is None else str(self.estimate)
        return "\n".join(filter(None, (self._title(), self.rows(), estimate)))

    def rows(self) -> str:
        """Return the table without its title; the same module of several blocks takes one line."""
        rows = [*self._swapped_rows(), *self._kept_rows()]
        module, count, cls = (max((len(row[i]) for row in rows), default=0) for i in range(3))
        return "\n".join(f"  {row[0]:<{module}} {row[1]:>{count}}  {row[2]:<{cls}}  {row[3]}" for row in rows)

    def _title(self) -> str:
        return f"vitkernels: {len(self.swapped)} swapped, {len(self.kept)} kept"

    def _swapped_rows(self) -> list[tuple[str, str, str, str]]:
        return _grouped((s.module, s.was, s.runs) for s in self.swapped)

    def _kept_rows(self) -> list[tuple[str, str, str, str]]:
        return _grouped((k.module, k.cls, f"kept: {k.reason}") for k in self.kept)


def _grouped(entries: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str, str]]:
    """Join entries that differ only in the numbers of their paths: ``blocks.*.attn``, ``×12``."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for module, cls, runs in entries:
        groups.setdefault((re.sub(r"(?<![^._])\d+(?![^.])", "*", module), cls, runs), []).append(module)
    rows = []
    for (pattern, cls, runs), modules in groups.items():
        many = len(modules) > 1
        rows.append(((pattern if many else modules[0]) or "(the model)", f"×{len(modules)}" if many else "", cls, runs))
    return rows
