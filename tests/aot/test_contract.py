"""The contract's rules and figures: what breaks it, what an update takes in, and what it never does."""

import dataclasses
import json

import pytest

pytest.importorskip("triton", reason="a contract names its Triton version")

import triton

from vitkernels.emulator.devices import DEVICES
from vitkernels.tools.aot import TARGETS, Report, contract
from vitkernels.tools.aot.counts import Counts

GOOD = Report("_kernel", "sm_90", num_warps=4, registers=64, spilled_bytes=0, shared_bytes=1024, blocks=8, narrow=2)
KEY = ("_kernel", "vit op bf16")


def of(figures=None, exceptions=(), version=triton.__version__):
    return {"triton": version, "exceptions": list(exceptions), "figures": figures or {}}


def change(**fields):
    return dataclasses.replace(GOOD, **fields)


KNOWN = of({"_kernel": {"vit op bf16": {"registers": 64, "blocks": 8, "narrow": 2}}})
EXCEPTION = {"rule": "spilled_bytes", "kernel": "_kernel", "case": "vit* bf16", "limit": 16, "reason": "ptxas 12.8"}


def test_what_is_known_holds():
    assert contract.check(KNOWN, {KEY: [GOOD]}, complete=True) == contract.Verdict([], [], [])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"spilled_bytes": 24}, "_kernel vit op bf16 spills 24 bytes"),
        ({"narrow_in_loop": 3}, "_kernel vit op bf16 has 3 loads or stores of global memory of 8 or 16 bits in a loop"),
        ({"slow_products": 1}, "off the chip's best matrix unit"),
        ({"shared_bytes": (227 << 10) + 1}, "takes 232449 bytes of shared memory, more than the chip has"),
        ({"atomics": 2}, "has 2 atomics"),
        ({"tf32": 8}, "has 8 products in TF32"),
        ({"address_bits": 32}, "computes addresses in 32 bits"),
        ({"blocks": 0}, "does not fit on a multiprocessor"),
    ],
)
def test_rules(fields, says):
    """One bad launch among good ones breaks its rule, and no update takes it in."""
    measured = {KEY: [GOOD, change(**fields), GOOD]}
    for known in (KNOWN, of()):
        broken = contract.check(known, measured, complete=True).broken
        assert says in broken[0]
        after = contract.update(known, measured, complete=True, accept_worse=True)
        assert after["figures"] == known["figures"]
        assert says in contract.check(after, measured, complete=True).broken[0]


def test_what_rules_allow():
    assert not contract.broken_rules(change(address_bits=32, reach_checked=True, shared_bytes=227 << 10))
    for target, kib in {"sm_80": 163, "sm_100": 227, "sm_120": 99, "gfx942": 64}.items():
        assert TARGETS[target].facts.shared_memory == kib << 10
        assert not contract.broken_rules(change(target=target, shared_bytes=kib << 10))
        assert contract.broken_rules(change(target=target, shared_bytes=(kib << 10) + 1)).keys() == {"shared_bytes"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"registers": 66}, "_kernel vit op bf16: registers 64 → 66"),
        ({"blocks": 7}, "_kernel vit op bf16: blocks 8 → 7"),
        ({"narrow": 3}, "_kernel vit op bf16: narrow 2 → 3"),
    ],
)
def test_worse(fields, says):
    """A worse figure fails with before and after, and is taken in only on purpose."""
    measured = {KEY: [GOOD, change(**fields)]}
    assert contract.check(KNOWN, measured, complete=True).broken == [says]
    assert contract.update(KNOWN, measured, complete=True, accept_worse=False) == KNOWN
    after = contract.update(KNOWN, measured, complete=True, accept_worse=True)
    assert contract.check(after, measured, complete=True) == contract.Verdict([], [], [])
    assert contract.check(after, {KEY: [GOOD]}, complete=True).better


def test_better():
    measured = {KEY: [change(registers=40, blocks=12)]}
    verdict = contract.check(KNOWN, measured, complete=True)
    assert verdict.broken == []
    assert verdict.better == ["_kernel vit op bf16: registers 64 → 40", "_kernel vit op bf16: blocks 8 → 12"]
    after = contract.update(KNOWN, measured, complete=True, accept_worse=False)
    assert contract.check(after, {KEY: [GOOD]}, complete=True).broken == [
        "_kernel vit op bf16: registers 40 → 64", "_kernel vit op bf16: blocks 12 → 8",
    ]  # fmt: skip
    # What got better and worse at once: the better half is taken in, the worse one still fails.
    mixed = {KEY: [change(registers=70, narrow=0)]}
    after = contract.update(KNOWN, mixed, complete=True, accept_worse=False)
    assert contract.check(after, mixed, complete=True).broken == ["_kernel vit op bf16: registers 64 → 70"]


def test_new_and_gone():
    new = {KEY: [GOOD], ("_other", "vit op bf16"): [GOOD]}
    assert "_other vit op bf16 is not in the contract" in contract.check(KNOWN, new, complete=True).broken[0]
    after = contract.update(KNOWN, new, complete=True, accept_worse=False)
    assert contract.check(after, new, complete=True).broken == []
    assert contract.check(after, {KEY: [GOOD]}, complete=False).broken == []
    gone = contract.check(after, {KEY: [GOOD]}, complete=True).broken
    assert gone == ["_other vit op bf16 is in the contract, and is not launched"]
    assert contract.update(after, {KEY: [GOOD]}, complete=False, accept_worse=False) == after
    assert contract.update(after, {KEY: [GOOD]}, complete=True, accept_worse=False) == KNOWN


def test_exceptions():
    known = of(KNOWN["figures"], [EXCEPTION])
    spilling = {KEY: [change(spilled_bytes=16)]}
    verdict = contract.check(known, spilling, complete=True)
    assert verdict.broken == []
    assert verdict.excepted == ["_kernel vit op bf16 spills 16 bytes: ptxas 12.8"]
    assert contract.update(known, spilling, complete=True, accept_worse=False) == known
    # Neither beyond its limit, nor for another rule, kernel or case; and it goes once nothing needs it.
    assert contract.check(known, {KEY: [change(spilled_bytes=17)]}, complete=True).broken
    assert contract.check(known, {KEY: [change(atomics=1)]}, complete=True).broken
    assert contract.check(known, {("_other", KEY[1]): spilling[KEY]}, complete=False).broken
    assert contract.check(known, {(KEY[0], "vit op fp32"): spilling[KEY]}, complete=False).broken
    assert contract.update(known, {KEY: [GOOD]}, complete=True, accept_worse=False) == KNOWN
    assert contract.update(known, {KEY: [GOOD]}, complete=False, accept_worse=False) == known


def test_an_exception_of_one_triton():
    """It counts under that one alone, and an update under another keeps it."""
    mine, others = (EXCEPTION | {"triton": version} for version in (triton.__version__, "0.0.0"))
    spilling = {KEY: [change(spilled_bytes=16)]}
    assert not contract.check(of(KNOWN["figures"], [mine]), spilling, complete=True).broken
    known = of(KNOWN["figures"], [others])
    assert contract.check(known, spilling, complete=True).broken
    assert contract.update(known, {KEY: [GOOD]}, complete=True, accept_worse=False) == known


def test_another_compiler():
    """Its figures are its own: rules are checked, figures are not."""
    known = of(KNOWN["figures"], version="0.0.0")
    worse = {KEY: [change(registers=255)], ("_other", "vit op bf16"): [GOOD]}
    assert contract.check(known, worse, complete=True).broken == []
    assert contract.check(known, {KEY: [change(spilled_bytes=4)]}, complete=True).broken


COUNTS = Counts(
    "_kernel", "sm_90", grid=8, programs=8, tensor=64, fma=500, alu=400, mufu=30, lsu=200, issue=1300,
    flops={"wgmma bf16": 1 << 20}, requests=100, sectors=1600, excess_sectors=10, wavefronts=500, conflicts=20,
    l2_bytes=51200, l2_least=25600, dram_bytes=40000, barriers=6,
)  # fmt: skip
WITH_COUNTS = contract.update(of(), {KEY: [GOOD]}, {KEY: [COUNTS]}, complete=True, accept_worse=False)


def recount(**fields):
    return {KEY: [dataclasses.replace(COUNTS, **fields)]}


def test_counts_are_sums_over_launches():
    """But a program's barriers: the most of any launch."""
    assert WITH_COUNTS["figures"]["_kernel"][KEY[1]] == {
        "registers": 64, "blocks": 8, "narrow": 2, "tensor": 64, "fma": 500, "alu": 400, "mufu": 30, "lsu": 200,
        "excess_sectors": 10, "conflicts": 20, "l2_bytes": 51200, "dram_bytes": 40000, "barriers": 6,
    }  # fmt: skip
    twice = contract.counted_figures([COUNTS, dataclasses.replace(COUNTS, barriers=9)])
    assert (twice["fma"], twice["conflicts"], twice["barriers"]) == (1000, 40, 9)


@pytest.mark.parametrize("figure", contract.COUNTED)
def test_more_counts_are_worse(figure):
    before = getattr(COUNTS, figure)
    more, less = recount(**{figure: before + 1}), recount(**{figure: before - 1})
    verdict = contract.check(WITH_COUNTS, {KEY: [GOOD]}, more, complete=True)
    assert verdict.broken == [f"_kernel vit op bf16: {figure} {before} → {before + 1}"]
    assert contract.update(WITH_COUNTS, {KEY: [GOOD]}, more, complete=True, accept_worse=False) == WITH_COUNTS
    after = contract.update(WITH_COUNTS, {KEY: [GOOD]}, more, complete=True, accept_worse=True)
    assert contract.check(after, {KEY: [GOOD]}, more, complete=True) == contract.Verdict([], [], [])
    verdict = contract.check(WITH_COUNTS, {KEY: [GOOD]}, less, complete=True)
    assert (verdict.broken, len(verdict.better)) == ([], 1)
    after = contract.update(WITH_COUNTS, {KEY: [GOOD]}, less, complete=True, accept_worse=False)
    assert after["figures"]["_kernel"][KEY[1]][figure] == before - 1


def test_without_a_run():
    """Counts in the contract are neither demanded nor dropped, and those of a run must be in it."""
    assert contract.check(WITH_COUNTS, {KEY: [GOOD]}, complete=True) == contract.Verdict([], [], [])
    for worse in (False, True):
        after = contract.update(WITH_COUNTS, {KEY: [change(registers=60)]}, complete=True, accept_worse=worse)
        assert after["figures"]["_kernel"][KEY[1]] == WITH_COUNTS["figures"]["_kernel"][KEY[1]] | {"registers": 60}
    (missing,) = contract.check(KNOWN, {KEY: [GOOD]}, recount(), complete=True).broken
    assert missing == (
        "_kernel vit op bf16 has no counts in the contract: `vitkernels inspect --run --update` takes them in"
    )
    assert contract.update(KNOWN, {KEY: [GOOD]}, recount(), complete=True, accept_worse=False) == WITH_COUNTS
    # Another kernel's counts are its own affair.
    other = {KEY: [GOOD], ("_other", KEY[1]): [GOOD]}
    after = contract.update(WITH_COUNTS, other, recount(), complete=True, accept_worse=False)
    assert contract.check(after, other, recount(), complete=True) == contract.Verdict([], [], [])


def test_counts_of_another_compiler():
    known = WITH_COUNTS | {"triton": "0.0.0"}
    assert contract.check(known, {KEY: [GOOD]}, recount(fma=1000), complete=True).broken == []


def test_files(tmp_path):
    assert contract.load("sm_90", tmp_path) == of()
    known = of(KNOWN["figures"] | {"_another": {"b op": KNOWN["figures"]["_kernel"][KEY[1]]}}, [EXCEPTION])
    contract.save("sm_90", known, tmp_path)
    assert contract.load("sm_90", tmp_path) == known
    path = tmp_path / "sm_90.json"
    assert sum("registers" in line for line in path.read_text().splitlines()) == 2  # a case a line
    contract.save("sm_90", WITH_COUNTS, tmp_path)
    assert contract.load("sm_90", tmp_path) == WITH_COUNTS
    assert sum("barriers" in line for line in path.read_text().splitlines()) == 1
    contract.save("sm_90", of(), tmp_path)
    assert contract.load("sm_90", tmp_path) == of()
    for bad in (
        [],
        {"triton": "3"},
        of({"_kernel": {"case": {"registers": 1}}}),
        of({"_kernel": {"case": {"registers": 1, "blocks": 1, "narrow": 1, "fma": 1}}}),  # all counts, or none
        of({"_kernel": {"case": WITH_COUNTS["figures"]["_kernel"][KEY[1]] | {"fma": 1.5}}}),
        of({"_kernel": {"case": {"registers": "1", "blocks": 1, "narrow": 1}}}),
        of(exceptions=[EXCEPTION | {"reason": " "}]),
        of(exceptions=[EXCEPTION | {"rule": "speed"}]),
        of(exceptions=[{"rule": "atomics"}]),
        of(exceptions=[EXCEPTION | {"triton": 3.6}]),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"sm_90\.json"):
            contract.load("sm_90", tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_contracts_of_the_library(target):
    """Every architecture has its contract, for every kernel, in the form that an update writes."""
    known = contract.load(target)
    assert len(known["figures"]) >= 12
    path = contract.FOLDER / f"{target}.json"
    before = path.read_text()
    assert json.loads(before) == known
    for exception in known["exceptions"]:
        assert exception["limit"] > 0
        assert exception["rule"] != "spilled_bytes"  # under every Triton: docs/compiler-report.md says so
    counted = ["fma" in figures for cases in known["figures"].values() for figures in cases.values()]
    assert all(counted) if target == "sm_90" else target in DEVICES or not any(counted)
