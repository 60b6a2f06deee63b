"""Search launch configurations on this GPU, and write the winners to ``vitkernels/tuning/tables``.

The rows to fill are those that the ops look up at the named cases. Each row is searched field by field: all values of a
field are timed in turns with the best configuration so far, and the fastest value is kept. The search ends when a pass
over the fields gains nothing, or when the row's share of the budget is spent. A configuration is allowed only if its
kernels break no rule of the contract (``vitkernels/tools/aot/contract.py``) more than the heuristic's do, and its
results and gradients are right. The winner is timed against the heuristic once more, and becomes a row only if it is
faster beyond both spreads.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.environment import Missing
from benchmarks.judge import judge_op
from benchmarks.ops import Tensors, all_ops
from benchmarks.ops.measure import call_of, results_of, truth_of, upstreams_of
from benchmarks.run import Budget, GpuTimer, measure
from benchmarks.schema import Times
from vitkernels import runtime, tuning
from vitkernels.ops import _plan
from vitkernels.testing.cases import CASES, DTYPES
from vitkernels.tools import _interrupt
from vitkernels.tools.console import check_can_fill, one_line

VIT_B = "vit_base_patch16_224"
TABLES = Path(tuning.__file__).parent / "tables"
USEFUL_S = 20.0  # a shorter search of a place gains nothing: compiling one kernel takes about a second
Config = dict[str, int | str]


@dataclasses.dataclass(frozen=True)
class Space:
    """The values of each field, and the configurations to start from: the search uses the first allowed one.

    An empty configuration is the heuristic's. Ops that accept only complete configurations have complete starts.
    """

    fields: Mapping[str, tuple[int | str, ...]]
    starts: tuple[Config, ...] = ({},)


def _tiling(regime: str, block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    sizes = {"block_m": block_m, "block_n": block_n, "num_warps": num_warps, "num_stages": num_stages}
    return {"regime": regime} | sizes


def _tilings(*starts: Config) -> Space:
    """Return attention's search space. A regime that a shape does not allow gives wrong results, and is refused."""
    fields = {
        "regime": ("blocks", "row", "windows"),
        "block_m": (16, 32, 64, 128),
        "block_n": (16, 32, 64, 128, 256),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3, 4),
    }
    return Space(fields, starts)


_BLOCKS = tuple(_tiling("blocks", *sizes) for sizes in ((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 1)))
_PRODUCT = Space(
    {
        "provider": ("triton", "torch"),
        "block_m": (64, 128, 256),
        "block_n": (64, 128, 256),
        "block_k": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
        "parts": (1, 2, 4, 8),
    }
)
_UNGATED = Space({**_PRODUCT.fields, "provider": ("triton", "gluon", "torch")})  # what gluon cannot do, it refuses
# The search space of each op of the table.
SPACES = {
    "attention_forward": _tilings(_tiling("row", 64, 128, 4, 1), _tiling("windows", 64, 64, 4, 1), *_BLOCKS),
    "attention_backward": _tilings(_tiling("row", 16, 256, 8, 1), _tiling("windows", 64, 64, 8, 1), *_BLOCKS),
    "attention_dq": _tilings(*_BLOCKS),
    "attention_dkv": _tilings(*_BLOCKS),
    "attention_dmask": _tilings(*_BLOCKS),
    "attention": Space({"provider": ("sdpa",)}),  # against our kernels, which are tuned above
    "linear": _UNGATED,
    "swiglu_mlp": _PRODUCT,
    "layer_norm": Space({"block_m": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8, 16)}),
    "layer_norm_backward": Space({"block_m": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8, 16)}),
    "patch_embed": Space(
        {
            "block_m": (32, 64, 128),
            "block_c": (32, 64, 128),
            "block_k": (32, 64, 128),
            "splits": (1, 2, 4, 8, 16, 32),
            "num_warps": (4, 8),
            "num_stages": (1, 2, 3, 4),
        }
    ),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A row of the table, and the workload at which it is searched: bench, case and dtype by name."""

    op: str
    key: str
    bench: str
    case: str
    dtype: str


class Lab(Protocol):
    """What tries configurations: the GPU, or a test's stand-in."""

    def places(self) -> list[Place]:
        """Return the rows to fill, the most important first."""

    def refusal(self, place: Place, config: Config) -> str:
        """Compile and check ``config`` at ``place``; return why it may not be used there, or an empty string."""

    def times(self, place: Place, configs: list[Config], seconds: float) -> list[Times]:
        """Time ``configs`` in turns; the empty one stands for the heuristic's."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result at one place: the row's configuration and times, or None and the reason."""

    place: Place
    config: Config | None
    times: Times | None
    heuristic: Times | None
    reason: str


def search(lab: Lab, budget: Budget, spaces: Mapping[str, Space] = SPACES) -> Iterator[Outcome]:
    """Search the places of ``lab``; each gets an equal share of the time left, at least :data:`USEFUL_S`."""
    places = lab.places()
    for number, place in enumerate(places):
        if place.op not in spaces:
            yield Outcome(place, None, None, None, f"no search space for {place.op}")
            continue
        if budget.left() <= 0:
            yield Outcome(place, None, None, None, "no time left in the budget")
            continue
        share = max(USEFUL_S, budget.left() / (len(places) - number))
        yield _search_place(lab, place, spaces[place.op], budget, min(share, budget.left()))


def _search_place(lab: Lab, place: Place, space: Space, budget: Budget, share: float) -> Outcome:
    # A fifth of the share is kept for the final comparison; the rest is spent in small steps.
    until, step = budget.spent() + share * 4 / 5, share / 40
    refusals: dict[str, str] = {}

    def allowed(config: Config) -> bool:
        if str(config) not in refusals:
            refusals[str(config)] = lab.refusal(place, config) if config else ""
        return not refusals[str(config)]

    best = next((start for start in space.starts if allowed(start)), None)
    if best is None:
        return Outcome(place, None, None, None, f"no configuration to start from: {next(iter(refusals.values()))}")
    improved = True
    while improved and budget.spent() < until:
        improved = False
        for field, values in space.fields.items():
            candidates = [{**best, field: value} for value in values if value != best.get(field)]
            candidates = [config for config in candidates if budget.spent() < until and allowed(config)]
            if not candidates or budget.spent() >= until:
                continue
            before, *times = lab.times(place, [best, *candidates], step)
            fastest = min(range(len(times)), key=lambda i: times[i].median)
            if times[fastest].median < before.median:
                best, improved = candidates[fastest], True
    if not best:
        return Outcome(place, None, None, None, "nothing that was tried is faster than the heuristic")
    times, heuristic = lab.times(place, [best, {}], share / 5)
    if times.p80 >= heuristic.p20:
        return Outcome(place, None, times, heuristic, "no faster than the heuristic beyond the spread")
    return Outcome(place, best, times, heuristic, "")


def table_with(table: dict | None, device_name: str, outcomes: list[Outcome]) -> dict:
    """Return ``table``, or a new one, with a row for each outcome that has a configuration.

    Raises:
        ValueError: The new table breaks the schema.
    """
    table = table or {"schema": tuning.SCHEMA, "device": device_name, "entries": {}}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    for outcome in outcomes:
        if outcome.config is not None:
            table["entries"].setdefault(outcome.place.op, {})[outcome.place.key] = {
                "config": outcome.config,
                "median_us": round(outcome.times.median, 3),
                "p20_us": round(outcome.times.p20, 3),
                "p80_us": round(outcome.times.p80, 3),
                "heuristic_us": round(outcome.heuristic.median, 3),
                "date": today,
                "versions": versions,
            }
    tuning.check_table(table, tuning.table_name(device_name))
    return table


def tune(device: torch.device, budget: Budget, folder: Path = TABLES, say: Callable[[str], None] = print) -> Path:
    """Search on ``device``, write its table to ``folder`` after every place, and return the file.

    Raises:
        Missing: There is no GPU, or no contract for its architecture.
        UserError: ``folder`` cannot be written to.
    """
    if device.type != "cuda":
        raise Missing("tuning needs a GPU")
    check_can_fill(folder)
    name = runtime.device_facts(device).name
    path = folder / tuning.table_name(name)
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    lookup = Lookup(tuning.lookup)
    timer = GpuTimer()
    with unittest.mock.patch.object(tuning, "lookup", lookup), timer.scope():
        for outcome in search(GpuLab(device, lookup, timer), budget):
            place = outcome.place
            result = outcome.reason
            if outcome.config is not None:
                gain = outcome.heuristic.median / outcome.times.median
                result = f"{outcome.times.median:.1f} µs, {gain:.2f} × the heuristic: {outcome.config}"
            say(f"{place.op} {place.key}: {result}")
            table = table_with(table, name, [outcome])
            with _interrupt.writing():
                path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    tuning._table.cache_clear()
    return path


class Lookup:
    """Replaces ``tuning.lookup``: it records what is looked up, and returns the configuration on trial."""

    def __init__(self, original: Callable):
        self.original = original
        self.asked: dict[tuple[str, str], None] = {}
        self._trial: tuple[tuple[str, str], Config] | None = None

    @property
    def trial(self) -> tuple[tuple[str, str], Config] | None:
        """The (op, key) of a place and the configuration to use there; setting it forgets all plans."""
        return self._trial

    @trial.setter
    def trial(self, trial: tuple[tuple[str, str], Config] | None) -> None:
        self._trial = trial
        _plan.forget()

    def __call__(self, op: str, device_name: str, key: str):
        self.asked[op, key] = None
        if self.trial is not None and self.trial[0] == (op, key):
            return self.trial[1] or None
        return self.original(op, device_name, key)


class GpuLab:
    """Tries configurations on the GPU."""

    def __init__(self, device: torch.device, lookup: Lookup, timer: GpuTimer):
        from vitkernels.tools.aot import TARGETS

        self.device, self.lookup, self.timer = device, lookup, timer
        self.target = runtime.device_facts(device).arch
        if self.target not in TARGETS:
            raise Missing(f"there is no contract for {self.target}; there is for {', '.join(TARGETS)}")

    def places(self) -> list[Place]:
        from vitkernels.tools.aot import launches

        found: dict[tuple[str, str], Place] = {}
        for dtype in ("bf16", "fp16"):
            for case in sorted(CASES.values(), key=lambda case: case.name != VIT_B):
                for bench in (op for op in launches(case, DTYPES[dtype]) if op in all_ops()):
                    self.lookup.asked.clear()
                    self._trace(bench, case.name, dtype)
                    if bench.startswith("attention"):
                        ask_who_attends(bench, case.name, dtype, self.device)
                    for op, key in self.lookup.asked:
                        found.setdefault((op, key), Place(op, key, bench, case.name, dtype))
        # Plain products come late: they have no epilogue and run on cuBLAS, so there is little to gain. The provider of
        # attention comes after attention's own kernels, as it is chosen against the tuned ones.
        return sorted(
            found.values(),
            key=lambda p: (p.dtype, p.key.endswith("plain"), p.case != VIT_B, p.op == "attention", p.op),
        )

    def refusal(self, place: Place, config: Config) -> str:
        try:
            allowed, breaches = self._breaches(place, {}), self._breaches(place, config)
            worse = [f"{kernel} {rule}" for (kernel, rule), n in breaches.items() if n > allowed.get((kernel, rule), 0)]
            if worse:
                return f"breaks the contract: {', '.join(worse)}"
            tensors, upstreams, yardstick, truth = self._workload(place.bench, place.case, place.dtype)
            self.lookup.trial = (place.op, place.key), config
            got = results_of(all_ops()[place.bench].ours, CASES[place.case], tensors, upstreams)
            verdict = judge_op(got, yardstick, truth)
            return "" if verdict.right else verdict.reason
        except Exception as error:  # any error of the compiler or the driver rules out a configuration
            return f"{type(error).__name__}: {one_line(error)}"
        finally:
            self.lookup.trial = None

    def times(self, place: Place, configs: list[Config], seconds: float) -> list[Times]:
        tensors, upstreams, *_ = self._workload(place.bench, place.case, place.dtype)
        call = call_of(all_ops()[place.bench].ours, CASES[place.case], tensors, "both", upstreams)

        def variant(config: Config):
            def run():
                self.lookup.trial = (place.op, place.key), config
                return call()

            return run

        try:
            measured = measure({str(c): variant(c) for c in configs}, self.timer, seconds, capture=True)
        finally:
            self.lookup.trial = None
        return [measured[str(c)][0] for c in configs]

    def _trace(self, bench: str, case: str, dtype: str):
        from vitkernels.tools.aot import launches, trace

        return trace(launches(CASES[case], DTYPES[dtype])[bench], self.target)

    def _breaches(self, place: Place, config: Config) -> dict[tuple[str, str], int]:
        """Return the worst breach under ``config`` by kernel and rule."""
        self.lookup.trial = (place.op, place.key), config
        try:
            found = self._trace(place.bench, place.case, place.dtype)
        finally:
            self.lookup.trial = None
        worst: dict[tuple[str, str], int] = {}
        for launch in dict.fromkeys(found):
            for rule, figure in _broken(launch).items():
                worst[launch.name, rule] = max(figure, worst.get((launch.name, rule), 0))
        return worst

    @functools.lru_cache(maxsize=1)  # noqa: B019  there is one lab per process, and its places are grouped by workload
    def _workload(self, bench: str, case: str, dtype: str) -> tuple[Tensors, list, dict, dict]:
        op, shape = all_ops()[bench], CASES[case]
        torch.manual_seed(0)
        tensors = op.inputs(shape, DTYPES[dtype], self.device)
        upstreams = upstreams_of(op.reference, shape, tensors)
        yardstick = results_of(op.reference, shape, tensors, upstreams)
        return tensors, upstreams, yardstick, truth_of(op.reference, shape, tensors, upstreams)


def ask_who_attends(bench: str, case: str, dtype: str, device: torch.device) -> None:
    """Call an attention op on fake tensors: the public function, not its launcher, looks up the provider."""
    op, shape = all_ops()[bench], CASES[case]
    with FakeTensorMode(), torch.no_grad():
        op.ours(shape, **op.inputs(shape, DTYPES[dtype], device))


@functools.cache
def _broken(launch) -> dict[str, int]:
    from vitkernels.tools.aot import compile_launch, read_kernel
    from vitkernels.tools.aot.contract import broken_rules

    return broken_rules(read_kernel(launch, compile_launch(launch))[0])
