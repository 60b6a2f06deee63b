"""The goals for a run: what is compared, with which limit, on which kind of device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.schema import OURS, Results, Row
from vitkernels.testing.cases import CASES

GOAL_BLOCK_US = {"no grad": 60.0, "forward and backward": 150.0}  # per call, on the host


@dataclasses.dataclass(frozen=True)
class Goal:
    """A goal for one kind of device: its text, its limit, and a function that returns figures and their names.

    Figures must be at least ``limit``, or at most if ``more`` is False.
    """

    text: str
    device: str
    limit: float
    figures: Callable[[Results], list[tuple[float, str]]]
    more: bool = True

    def verdict(self, results: Results) -> tuple[str, str]:
        """Return the worst figure and whether it meets the goal, as texts."""
        found = self.figures(results)
        if not found:
            other = self.device != results.device["kind"]
            return "", "not measured: it is for a GPU" if other and self.device == "cuda" else "not measured"
        value, where = (min if self.more else max)(found)
        met = value >= self.limit if self.more else value <= self.limit
        return f"{value:.3g} ({where})" if len(found) > 1 else f"{value:.3g}", "met" if met else "not met"


def _measured(results: Results, **wanted) -> list[Row]:
    rows = [row for row in results.rows if row.time is not None]
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def _over(rivals: str, ours: str = OURS, *, memory: bool = False, **wanted) -> Callable:
    """Return a function that finds the best rival's time or memory over our best; names are matched by prefix."""

    def figures(results: Results) -> list[tuple[float, str]]:
        by_workload: dict[tuple, list[Row]] = {}
        for row in _measured(results, **wanted):
            by_workload.setdefault(row.workload, []).append(row)
        found = []
        for rows in by_workload.values():
            mine, theirs = (
                [(row.peak_bytes if memory else row.time.median) for row in rows if row.provider.startswith(name)]
                for name in (ours, rivals)
            )
            if mine and theirs and None not in mine + theirs:
                found.append((min(theirs) / min(mine), rows[0].case or rows[0].name))
        return found

    return figures


def _layer_norm_rate(results: Results) -> list[tuple[float, str]]:
    found = []
    for mode in ("forward", "backward"):
        for row in _measured(results, kind="op", name="layer_norm", mode=mode, dtype="bf16", provider=OURS):
            case = CASES[row.case]
            if case.channels >= 768 and row.batch * case.tokens >= 16_000 and row.of_roofline is not None:
                found.append((row.of_roofline, f"{row.case}, {mode}"))
    return found


def _times(scale: float, **wanted) -> Callable:
    return lambda results: [(row.time.median / scale, row.case) for row in _measured(results, **wanted)]


_VIT_B = {"kind": "model", "name": "vit_base_patch16_224"}
GOALS = (
    Goal(
        "ViT-B/16 forward on a CPU, accelerated: × plain timm, 0.98 or more", "cpu", 0.98,
        _over("timm", mode="inference", **_VIT_B),
    ),
    *(
        Goal(
            f"a block's call on the host but for its launches, {mode}: {us:g} µs or less", "any", us,
            _times(1.0, name="call but for launches", case="block", provider=OURS, mode=mode), more=False,
        )
        for mode, us in GOAL_BLOCK_US.items()
    ),
    Goal(
        "import vitkernels, beyond torch's own: 0.2 s or less", "any", 0.2,
        _times(1e6, name="import", case="vitkernels"), more=False,
    ),
    Goal(
        "ViT-B/16 inference, bf16, batch 256: × the best torch.compile, 1.15 or more", "cuda", 1.15,
        _over("compile", mode="inference", batch=256, dtype="bf16", **_VIT_B),
    ),
    Goal(
        "ViT-B/16 training step, bf16, batch 256: × the best torch.compile, 1.10 or more", "cuda", 1.10,
        _over("compile", mode="training", batch=256, dtype="bf16", **_VIT_B),
    ),
    Goal(
        "ViT-B/16 training step, bf16, batch 256: eager's peak memory over ours, 1.25 or more", "cuda", 1.25,
        _over("timm", memory=True, mode="training", batch=256, dtype="bf16", **_VIT_B),
    ),
    Goal(
        "ViT-B/16 inference, bf16, batch 1, under a graph: × reduce-overhead, 1.3 or more", "cuda", 1.3,
        _over("compile reduce-overhead", f"{OURS} graph", mode="inference", batch=1, dtype="bf16", **_VIT_B),
    ),
    Goal("LayerNorm, bf16, 768 channels and 16k tokens or more: 0.88 of the copy rate", "cuda", 0.88, _layer_norm_rate),
    Goal(
        "fc1 + activation, bf16, forward: × the best torch.compile, 1.10 or more", "cuda", 1.10,
        _over("compile", kind="op", name="linear_activation", mode="forward", dtype="bf16"),
    ),
    Goal(
        "patch embedding, bf16, forward: × PyTorch's, 1.5 or more", "cuda", 1.5,
        _over("torch", kind="op", name="patch_embed", mode="forward", dtype="bf16"),
    ),
)  # fmt: skip
