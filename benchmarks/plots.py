"""The pictures of a report: each function takes results and returns a figure, or None if there is no data for it."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.formats import workload_name
from benchmarks.goals import GOAL_BLOCK_US
from benchmarks.schema import OURS, Results, Row

OURS_COLOR = "#0b7a55"
OURS_SHADES = (OURS_COLOR, "#63b899", "#b5ddcd")
RIVAL_SHADES = ("#35506e", "#7d97b3", "#b6c6d6", "#d9a441", "#b4653a", "#8c6bb1", "#c9c9c9")
CATEGORIES = (
    "#0b7a55", "#35506e", "#d9a441", "#b4653a", "#8c6bb1", "#3b9ec7", "#99a83a", "#c2577b", "#6d6d6d", "#17becf",
    "#e07a5f", "#5c4b51", "#1f3d9c", "#e8b4c8", "#74c476", "#a50f15",
)  # fmt: skip
_TICKS = (1, 1.25, 1.6, 2, 3, 5, 8)  # ticks in each decade of a ratio's axis
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


def draw_all(results: Results) -> dict[str, tuple[str, Figure]]:
    """Return caption and figure of every picture that has data, by file name without suffix."""
    import matplotlib

    pictures = {
        "speed": ("Speed of our ops against the best rival's, by shape. Right of 1 is faster.", speed),
        "roofline": ("Each op against what this machine was seen to reach in the same run.", roofline),
        "throughput": ("Images a second.", throughput),
        "memory": ("Peak memory, parameters and optimizer state included.", memory),
        "calls": ("What a call costs the host, its launches left out; ours in green.", calls),
        "traffic": ("Passes of one block over its activations beyond what it must read and write. Counted.", traffic),
    }
    found = {}
    with matplotlib.rc_context(STYLE):
        for name, (caption, draw) in pictures.items():
            figure = draw(results)
            if figure is not None:
                found[name] = caption, figure
    return found


def _new(width: float, height: float, columns: int = 1, **options):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def _timed(results: Results, kind: str) -> list[Row]:
    return [row for row in results.rows if row.kind == kind and row.time is not None]


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _main_dtype(rows: list[Row]) -> str:
    return collections.Counter(row.dtype for row in rows).most_common(1)[0][0]


def _plain_number(value: float, _=None) -> str:
    return f"{value:g}"


def speed(results: Results) -> Figure | None:
    """Draw the best rival's time over ours: one dot per op and case, one panel per mode."""
    rows = [row for row in _timed(results, "op") if row.over_best_rival is not None]
    if not rows:
        return None
    dtype = _main_dtype(rows)
    rows = [row for row in rows if row.dtype == dtype]
    modes, ops, cases = (_distinct(getattr(row, field) for row in rows) for field in ("mode", "name", "case"))
    figure, axes = _new(3.2 + 3.2 * len(modes), 1.6 + 0.42 * len(ops), len(modes), sharey=True, sharex=True)
    for ax, mode in zip(axes, modes, strict=True):
        ax.axvline(1, color="#444444", linewidth=1)
        for i, case in enumerate(cases):
            mine = [row for row in rows if row.mode == mode and row.case == case]
            # Cases of one op would cover each other: shift them.
            offset = 0.0 if len(cases) == 1 else (i / (len(cases) - 1) - 0.5) * 0.6
            places = [ops.index(row.name) + offset for row in mine]
            ratios = [row.over_best_rival for row in mine]
            low = [r - r * row.time.median / row.time.p80 for r, row in zip(ratios, mine, strict=True)]
            high = [r * row.time.median / row.time.p20 - r for r, row in zip(ratios, mine, strict=True)]
            ax.errorbar(
                ratios, places, xerr=[low, high], fmt="o", markersize=6, elinewidth=1.2,
                color=CATEGORIES[i % len(CATEGORIES)], label=case,
            )  # fmt: skip
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=_TICKS))
        ax.xaxis.set_major_formatter(FuncFormatter(_plain_number))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks(range(len(ops)), ops)
        ax.set_ylim(len(ops) - 0.4, -0.6)
        ax.set_title(mode)
        ax.set_xlabel(f"times as fast as the best rival, {dtype}")
        ax.grid(axis="x")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(cases)))
    return figure


def roofline(results: Results) -> Figure | None:
    """Draw rate over intensity: the ceilings as a line, our ops filled, the best rivals' hollow."""
    rows = [row for row in _timed(results, "op") if row.of_roofline is not None]
    if not rows:
        return None
    dtype = _main_dtype(rows)
    rows = _best_of_each_side([row for row in rows if row.dtype == dtype])
    if any(row.mode == "backward" for row in rows):  # then mode "both" adds nothing new
        rows = [row for row in rows if row.mode != "both"]
    peak, rate = results.ceilings[f"tflops {dtype}"], results.ceilings["gb_per_s"]
    ridge = peak * 1e3 / rate  # FLOPs per byte at which the two ceilings meet
    intensities = [row.flops / row.bytes for row in rows]
    left, right = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
    figure, (ax,) = _new(9, 5)
    ax.plot([left, ridge, right], [left * rate / 1e3, peak, peak], color="#444444", linewidth=1.4)
    ax.annotate(f"{peak:.3g} TFLOP/s", (right, peak), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=9)
    ax.annotate(
        f"{rate:.4g} GB/s", ((left * ridge) ** 0.5, (left * ridge) ** 0.5 * rate / 1e3),
        xytext=(-8, 6), textcoords="offset points", ha="right", fontsize=9,
    )  # fmt: skip
    ops, modes = _distinct(row.name for row in rows), _distinct(row.mode for row in rows)
    size = 8 if len(rows) < 60 else 4.5
    for row in rows:
        color = CATEGORIES[ops.index(row.name) % len(CATEGORIES)]
        ax.plot(
            row.flops / row.bytes, row.flops / row.time.median / 1e6, "os^"[modes.index(row.mode) % 3], color=color,
            markersize=size, markerfacecolor=color if row.ours else "none", zorder=3 if row.ours else 2,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain_number))
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("FLOPs a byte, by formula")
    ax.set_ylabel("TFLOP/s")
    ax.set_title(f"{dtype}: filled is ours, hollow the best rival")
    ax.grid()
    handles = [
        Line2D([], [], color=CATEGORIES[i % len(CATEGORIES)], marker="o", linestyle="", label=op)
        for i, op in enumerate(ops)
    ]
    handles += [
        Line2D([], [], color="#444444", marker="os^"[i % 3], markerfacecolor="none", linestyle="", label=mode)
        for i, mode in enumerate(modes)
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9)
    return figure


def _best_of_each_side(rows: list[Row]) -> list[Row]:
    """Return our fastest row and the rivals' fastest row of each workload."""
    best: dict[tuple, Row] = {}
    for row in rows:
        side = (row.workload, row.ours)
        if side not in best or row.time.median < best[side].time.median:
            best[side] = row
    return list(best.values())


def throughput(results: Results) -> Figure | None:
    """Draw images per second by model and provider, one panel per mode and batch."""
    return _bars_by_model(
        results,
        lambda row: row.batch / row.time.median * 1e6,
        "images a second",
        lambda row: (row.batch / row.time.p80 * 1e6, row.batch / row.time.p20 * 1e6),
    )


def memory(results: Results) -> Figure | None:
    """Draw peak memory by model and provider, if the run has it."""
    return _bars_by_model(
        results, lambda row: row.peak_bytes and row.peak_bytes / 2**30, "GiB", lambda row: (row.peak_bytes / 2**30,) * 2
    )


def _bars_by_model(results: Results, figure_of, unit: str, spread_of) -> Figure | None:
    rows = [row for row in _timed(results, "model") if figure_of(row)]
    if not rows:
        return None
    providers = _distinct(row.provider for row in sorted(rows, key=lambda row: not row.ours))
    colors = _provider_colors(providers)
    panels = _distinct((row.mode, row.batch) for row in rows)[:4]
    rows = [row for row in rows if (row.mode, row.batch) in panels]
    # The panels share the names at the left: every panel has a place for each bar.
    places, ticks, bottom = {}, [], 0.0
    for workload in _distinct(workload_name(row, short=True) for row in rows):
        there = {row.provider for row in rows if workload_name(row, short=True) == workload}
        mine = [provider for provider in providers if provider in there]
        places |= {(workload, provider): bottom + i for i, provider in enumerate(mine)}
        ticks.append((bottom + (len(mine) - 1) / 2, workload))
        bottom += len(mine) + 0.8
    figure, axes = _new(3.6 + 2.9 * len(panels), 1.4 + 0.2 * bottom, len(panels), sharey=True)
    for ax, panel in zip(axes, panels, strict=True):
        for row in (row for row in rows if (row.mode, row.batch) == panel):
            place = places[workload_name(row, short=True), row.provider]
            value, (low, high) = figure_of(row), spread_of(row)
            ax.barh(place, value, height=0.86, color=colors[row.provider])
            ax.plot([low, high], [place, place], color="#222222", linewidth=1)
            ax.annotate(
                f"{value:.3g}" if value < 1000 else f"{value:.0f}", (max(high, value), place),
                xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        ax.set_yticks([tick for tick, _ in ticks], [name for _, name in ticks])
        ax.set_ylim(bottom - 1.1, -0.8)
        ax.margins(x=0.16)
        ax.set_xlim(left=0)
        ax.set_title(f"{panel[0]}, batch {panel[1]}")
        ax.set_xlabel(unit)
        ax.grid(axis="x")
    handles = [Patch(color=colors[provider], label=provider) for provider in providers]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _provider_colors(providers: list[str]) -> dict[str, str]:
    ours = [p for p in providers if p.startswith("vitkernels")]
    rivals = [p for p in providers if p not in ours]
    colors = {p: OURS_SHADES[i % len(OURS_SHADES)] for i, p in enumerate(ours)}
    return colors | {p: RIVAL_SHADES[i % len(RIVAL_SHADES)] for i, p in enumerate(rivals)}


def calls(results: Results) -> Figure | None:
    """Draw microseconds per call without its launches, one bar per op, and PyTorch's minimum if it was measured."""
    rows = [row for row in _timed(results, "cost") if row.name == "call but for launches"]
    if not rows:
        return None
    modes, ops = (_distinct(getattr(row, field) for row in rows) for field in ("mode", "case"))
    figure, axes = _new(4 + 3.4 * len(modes), 1.3 + 0.34 * len(ops), len(modes), sharey=True)
    for ax, mode in zip(axes, modes, strict=True):
        mine = [row for row in rows if row.mode == mode]
        places = [ops.index(row.case) for row in mine]
        medians = [row.time.median for row in mine]
        spread = [[m - r.time.p20 for m, r in zip(medians, mine, strict=True)],
                  [r.time.p80 - m for m, r in zip(medians, mine, strict=True)]]  # fmt: skip
        colors = [OURS_COLOR if row.ours else RIVAL_SHADES[0] for row in mine]
        ax.barh(places, medians, xerr=spread, color=colors, height=0.7, error_kw={"elinewidth": 1})
        for place, row in zip(places, mine, strict=True):
            ax.annotate(
                f"{row.time.median:.1f}", (row.time.p80, place),
                xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        if goal := GOAL_BLOCK_US.get(mode):
            ax.axvline(goal, color="#b4653a", linewidth=1.2, linestyle="--")
            ax.annotate(
                f"goal of block {goal:g}", (goal, 1.0), xycoords=("data", "axes fraction"), color="#b4653a",
                xytext=(3, -2), textcoords="offset points", va="bottom", fontsize=8,
            )  # fmt: skip
        ax.set_yticks(range(len(ops)), ops)
        ax.margins(x=0.12)
        ax.set_title(mode, pad=14)
        ax.set_xlabel("µs")
        ax.grid(axis="x")
    axes[0].invert_yaxis()
    return figure


def traffic(results: Results) -> Figure | None:
    """Draw the extra passes of our block, timm's and the compiled one, one panel per mode."""
    rows = [row for row in results.rows if row.name == "passes over the activations" and row.figures]
    if not rows:
        return None
    modes, models, providers = (
        _distinct(getattr(row, field) for row in rows) for field in ("mode", "case", "provider")
    )
    providers.sort(key=lambda provider: provider != OURS)
    figure, axes = _new(4 + 3.4 * len(modes), 1.6 + 0.5 * len(models), len(modes), sharey=True)
    for ax, mode in zip(axes, modes, strict=True):
        for i, provider in enumerate(providers):
            mine = [row for row in rows if row.mode == mode and row.provider == provider]
            places = [models.index(row.case) + ((i + 0.5) / len(providers) - 0.5) * 0.76 for row in mine]
            values = [row.figures["extra"] for row in mine]
            color = OURS_COLOR if provider == OURS else RIVAL_SHADES[i - 1]
            ax.barh(places, values, height=0.72 / len(providers), color=color, label=provider)
            for place, value in zip(places, values, strict=True):
                ax.annotate(f"{value:.1f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center",
                            fontsize=8)  # fmt: skip
        ax.set_yticks(range(len(models)), models)
        ax.margins(x=0.12)
        ax.set_title(mode)
        ax.set_xlabel("passes")
        ax.grid(axis="x")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(providers))
    return figure
