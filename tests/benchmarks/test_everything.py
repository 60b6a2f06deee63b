"""The one command for a rented GPU: what is wrong is found before anything is timed."""

import dataclasses

import pytest
import torch

from benchmarks import everything
from benchmarks.everything import check_rows, run_everything
from benchmarks.ops import all_ops
from benchmarks.run import Budget
from benchmarks.schema import load
from benchmarks.suites import Job
from vitkernels import runtime
from vitkernels.testing.cases import Case

CASE = Case("small", 2, 24, 8, 1, 32, 2, 48)
OPS = {name: bench for name, bench in all_ops().items() if name in ("layer_norm", "linear", "swiglu_mlp")}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(everything, "CASES", {"small": CASE})
    monkeypatch.setattr(everything, "CHECKED", ("small",))
    ops = dict(OPS)
    monkeypatch.setattr(everything, "all_ops", lambda: ops)
    with runtime.use_backend("torch"):
        yield ops


def wrong(case, **tensors):
    return OPS["linear"].reference(case, **tensors) * 1.01


def broken(case, **tensors):
    raise RuntimeError("out of resource: shared memory\nmore")


def test_right_ops_pass(small, session):
    rows = list(check_rows(session))
    assert [(r.name, r.dtype) for r in rows] == [(n, d) for d in ("bf16", "fp32") for n in ("linear", "layer_norm")]
    assert {row.status for row in rows} == {"passed"}
    assert all(row.time is None and row.error_ratio is not None for row in rows)


@pytest.mark.parametrize(("ours", "says"), [(wrong, "RMS error"), (broken, "RuntimeError: out of resource")])
def test_wrong_and_broken_ops_are_found(small, session, ours, says):
    small["linear"] = dataclasses.replace(OPS["linear"], ours=ours)
    rows = {row.name: row for row in check_rows(session) if row.dtype == "bf16"}
    assert rows["linear"].status == "wrong"
    assert says in rows["linear"].reason
    assert rows["layer_norm"].status == "passed"


def test_checks_end_with_their_share(small, session, clock):
    session.cap = 5.0
    clock.now = 6.0
    assert {(row.status, row.reason) for row in check_rows(session)} == {
        ("skipped", "no time left in the share of checks")
    }


def test_the_whole_run(small, path, monkeypatch):
    monkeypatch.setattr(
        everything, "plan", lambda suite, device: [Job("quick", lambda session: 0.0, lambda session: [])]
    )
    run_everything(torch.device("cpu"), Budget(60.0), path)
    results = load(path)
    assert results.complete
    assert results.suite == "everything"
    assert results.left_out == {"tuning": "tuning needs a GPU"}
    assert {row.kind for row in results.rows} == {"check"}
