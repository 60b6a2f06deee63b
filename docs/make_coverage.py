"""Write docs/coverage.md: which modules of each of timm's models accelerate() swaps.

    python docs/make_coverage.py

The script builds every model on the meta device, without data, and explains, accelerates and runs it there. It stops if
a module that the report calls swapped still runs the forward of its original class. It takes a quarter of an hour.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import statistics
import sys
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from vitkernels import swap
from vitkernels.swap import _rules
from vitkernels.swap.estimate import image_size
from vitkernels.tools.console import import_timm, track

PAGE = Path(__file__).with_name("coverage.md")
# The kinds of blocks that run fused as a whole, by the module of timm and the class.
WHOLE = (
    "vision_transformer.Block",
    "vision_transformer.ResPostBlock",
    "eva.EvaBlock",
    "eva.EvaBlockPostNorm",
    "swin_transformer.SwinTransformerBlock",
    "swin_transformer_v2.SwinTransformerV2Block",
    "swin_transformer_v2_cr.SwinTransformerV2CrBlock",
    "beit.Block",
    "vision_transformer_relpos.RelPosBlock",
    "vision_transformer_relpos.ResPostRelPosBlock",
    "vision_transformer_sam.Block",
    "maxxvit.PartitionAttentionCl",
    "maxxvit.ParallelPartitionAttention",
    "maxxvit.TransformerBlock2d",
    "nest.TransformerLayer",
    "davit.SpatialBlock",
    "twins.Block",
    "gcvit.GlobalContextVitBlock",
    "hieradet_sam2.MultiScaleBlock",
    "mvitv2.MultiScaleBlock",
    "volo.Transformer",
)
ATTENTION = re.compile("Attention|Attn|MHSA|GPSA|XCA")
HEAD = """\
# Coverage of timm

What `vitkernels.accelerate(model)` makes of each of the {names} names of timm {timm}; written by
`docs/make_coverage.py`, which builds every one on the meta device, runs it there accelerated, and stops where a module
that the report calls swapped runs its original forward. `vitkernels explain NAME` says the same of one model.

**Whole blocks** of {whole} names run fused: {blocks} (a model may have two kinds).
{attention} names hold a module whose class is called attention. Of another {parts} names some
parts are swapped one by one: LayerNorm, RmsNorm, Mlp and its gated relatives, the patch embedding; where nothing is,
the model runs as it did.

*Time fused* is the part of a model's estimated time, before the swap, that lies in what is swapped: its median over
the family, as `vitkernels/swap/estimate.py` tells it from FLOPs and bytes, for one image of the model's own size. It
is no measurement, and not the time that is saved. Families are modules of `timm.models`.

| family | names | with attention | whole blocks | parts | time fused | what is swapped | attention that is left |
|---|--:|--:|--:|--:|--:|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Found:
    """The result for one model."""

    family: str
    attention: frozenset[str]  # classes of attention
    swapped: frozenset[str]  # original classes of the swapped modules, and of the attentions that they read
    whole: frozenset[str]  # kinds of blocks, all of which are swapped
    share: float | None


def look_at(timm, name: str) -> Found:
    """Build ``name`` on the meta device, read its report, and check that the report is true.

    Raises:
        RuntimeError: ``explain`` and ``accelerate`` disagree, or a swapped module runs its original forward.
        Exception: The model cannot run on the meta device.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = timm.create_model(name).eval()
    family = type(model).__module__.rpartition(".")[2]
    attention = frozenset(c.__name__ for c in map(type, model.modules()) if ATTENTION.search(c.__name__))
    report = swap.explain(model)
    # A block's class counts as swapped only if no block of that class is kept.
    kinds = {path: f"{type(m).__module__.rpartition('.')[2]}.{type(m).__name__}" for path, m in model.named_modules()}
    kept = {kinds[entry.module] for entry in report.kept if entry.known}
    counted = [e for e in report.swapped if kinds[e.module] not in kept or kinds[e.module] not in WHOLE]
    swapped = frozenset(entry.was for entry in counted) | (attention & frozenset(read_by_swapped(model, counted)))
    whole = frozenset(kinds[entry.module] for entry in counted) & frozenset(WHOLE)
    share = None if report.estimate is None else report.estimate.fused_share
    if swap.accelerate(model) != report:
        raise RuntimeError(f"{name}: explain and accelerate disagree")
    if report.swapped:
        strayed = original_forwards(model)
        if strayed:
            raise RuntimeError(f"{name}: reported as swapped, but run their own forward: {dict(strayed)}")
    return Found(family, attention, swapped, whole, share)


def read_by_swapped(model: nn.Module, swapped: list[swap.Swapped]) -> Iterator[str]:
    """Yield the classes of the modules that the ``swapped`` read instead of calling."""
    for entry in swapped:
        module = model.get_submodule(entry.module)
        for path in _rules.RULES[type(module)].bypassed:
            yield type(_rules.descendant(module, path)).__name__


def original_forwards(model: nn.Module) -> Counter[str]:
    """Run ``model`` on the meta device, and count by class the swapped modules that run their original forward."""
    rules = {id(rule): rule for rule in _rules.RULES.values() if "forward" in vars(rule.fused)}.values()
    by_code = {inspect.unwrap(rule.original.forward).__code__: rule for rule in rules}
    counted: Counter[str] = Counter()

    def count(frame: types.FrameType, event: str, _: object) -> None:
        # Use a profiler: if we patched a class's forward instead, its modules would no longer run fused.
        rule = by_code.get(frame.f_code) if event == "call" else None
        if rule is not None and type(frame.f_locals["self"]) is rule.fused:
            counted[rule.original.__name__] += 1

    sys.setprofile(count)
    try:
        with torch.no_grad():
            model(torch.empty(1, *image_size(model), device="meta"))
    finally:
        sys.setprofile(None)
    return counted


def lines(found: dict[str, Found], version: str) -> Iterator[str]:
    """Yield the parts of the page."""
    blocks = Counter(kind for f in found.values() for kind in f.whole)
    yield HEAD.format(
        names=len(found),
        timm=version,
        whole=sum(bool(f.whole) for f in found.values()),
        attention=sum(bool(f.attention) for f in found.values()),
        parts=sum(bool(f.swapped) and not f.whole for f in found.values()),
        blocks=", ".join(f"`{kind}` {blocks[kind]}" for kind in WHOLE if blocks[kind]),
    )
    families: dict[str, list[Found]] = {}
    for f in found.values():
        families.setdefault(f.family, []).append(f)
    for family, members in sorted(families.items()):
        shares = [f.share for f in members if f.share is not None]
        swapped = sorted({cls for f in members for cls in f.swapped})
        left = sorted({cls for f in members for cls in f.attention - f.swapped})
        yield (
            f"| {family} | {len(members)} | {sum(bool(f.attention) for f in members)} "
            f"| {sum(bool(f.whole) for f in members)} | {sum(bool(f.swapped) and not f.whole for f in members)} "
            f"| {f'{100 * statistics.median(shares):.0f} %' if shares else 'not known'} "
            f"| {', '.join(swapped) or '—'} | {', '.join(left) or '—'} |\n"
        )


def main() -> int:
    timm = import_timm()
    names = timm.list_models()
    found = {name: look_at(timm, name) for name in track(names, "models of timm")}
    PAGE.write_text("".join(lines(found, timm.__version__)), encoding="utf-8")
    print(f"{PAGE}: {len(found)} names, {sum(bool(f.whole) for f in found.values())} with whole blocks fused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
