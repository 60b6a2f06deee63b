"""A run: it stops in time, says what it left out, and what was measured outlives whatever ends it."""

import html
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import suites
from benchmarks.environment import Missing
from benchmarks.run import Budget
from benchmarks.schema import Row, Times, load
from benchmarks.suites import Job, plan, run_jobs, run_suite

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def row(name: str) -> Row:
    return Row("cost", name, "", "vitkernels", "", time=Times(1.0, 1.0, 1.0, 1))


def job(title, seconds, clock=None, takes=None, error=None):
    def rows(session):
        if clock is not None:
            clock.now += seconds if takes is None else takes
        yield row(title)
        if error is not None:
            raise error

    return Job(title, lambda session: seconds, rows)


def shown(*args):
    pass


def test_budget_is_kept_and_the_rest_is_named(session, clock, path):
    jobs = [job("a", 30.0, clock), job("b", 40.0, clock), job("c", 50.0, clock), job("d", 20.0, clock)]
    run_jobs(jobs, session, path, shown)
    assert [r.name for r in session.results.rows] == ["a", "b", "d"], "what fits is done, in order"
    assert session.results.left_out == {"c": "no time left in the budget"}
    assert clock.now == 90.0
    assert load(path).rows == session.results.rows


def test_a_job_may_not_take_all_the_time_left(session, clock, path):
    caps = []

    def rows(session):
        caps.append(session.left())
        yield row(str(len(caps)))

    run_jobs([Job("1", lambda session: 10.0, rows), Job("2", lambda session: 0.0, rows)], session, path, shown)
    assert caps == [suites.SHARE * 100 + 10, suites.SHARE * 100]


def test_one_job_failing_costs_only_itself(session, clock, path):
    jobs = [
        job("a", 1.0, clock, error=RuntimeError("broke\nhere")),
        job("b", 1.0, clock, error=Missing("not installed")),
        job("c", 1.0, clock, error=torch.OutOfMemoryError()),
        job("d", 1.0, clock),
    ]
    run_jobs(jobs, session, path, shown)
    assert [r.name for r in load(path).rows] == ["a", "b", "c", "d"]
    assert load(path).left_out == {
        "a": "RuntimeError: broke",
        "b": "not installed",
        "c": "out of memory on the device",
    }


def test_an_interrupted_run_leaves_what_it_had(path, monkeypatch):
    monkeypatch.setattr(suites, "measure_ceilings", lambda *args: {"gb_per_s": 1.0})
    jobs = [job("a", 0.0), job("b", 0.0, error=KeyboardInterrupt()), job("c", 0.0)]
    with pytest.raises(KeyboardInterrupt):
        run_suite("quick", CPU, Budget(60.0), path, jobs=jobs)
    left = load(path)
    assert not left.complete
    assert [r.name for r in left.rows][:1] == ["a"]
    run_suite("quick", CPU, Budget(60.0), path, jobs=jobs[:1])
    assert load(path).complete


def with_backend(name: str) -> dict[str, str]:
    return {**os.environ, "VITKERNELS_BACKEND": name}


CUT_SHORT = """
import os, shutil, signal, sys, time, types
from benchmarks import suites
from benchmarks.__main__ import main

def run_suite(suite, device, budget, path):
    shutil.copyfile(sys.argv[1], path)
    sys.modules["matplotlib.figure"] = types.ModuleType("matplotlib.figure")  # without which no picture is drawn
    exec("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")

suites.run_suite = run_suite
sys.exit(main(["--out", sys.argv[2]]))
"""


def cut_short(out: Path) -> subprocess.Popen:
    """Start a run that has its results and is interrupted, within an import, in code from a string."""
    kept = next((ROOT / "benchmarks" / "results" / "cpu").glob("*.json"))
    return subprocess.Popen(
        [sys.executable, "-c", CUT_SHORT, kept, out], env=with_backend("auto"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_an_import_cut_short_does_not_reach_the_report(tmp_path):
    run = cut_short(tmp_path)
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 130, errors
    assert "Traceback" not in errors
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    assert "report.html" in said


def test_a_second_interrupt_leaves_without_the_report(tmp_path):
    run = cut_short(tmp_path)
    while "Interrupted" not in (line := run.stderr.readline()):
        assert run.poll() is None, line
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=5)
    assert run.returncode == 130
    assert not errors
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", suites.SUITES)
def test_plans(suite, device):
    titles = [job.title for job in plan(suite, torch.device(device))]
    assert len(titles) == len(set(titles)) > 10
    if suite == "all":
        for part in suites.SUITES:
            assert set(titles) >= {job.title for job in plan(part, torch.device(device))}
    if suite in ("models", "all") and device == "cuda":
        for words in ("vit_tiny_patch16_224", "vit_giant_patch14_dinov2 518 px", "dinov3", "siglip_384", "clip_336"):
            for load_ in ("inference, batch 1, bf16", "inference, batch 256, fp32", "training, batch 32, fp16"):
                assert any(words in title and title.endswith(load_) for title in titles), (words, load_)


def command(*args: str, backend: str = "auto") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *args], env=with_backend(backend),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="where a GPU is, none is emulated")
def test_an_emulated_gpu_is_not_timed(tmp_path):
    out, err = (run := command("--out", str(tmp_path), backend="emulated")).communicate(timeout=120)
    assert (run.returncode, out) == (2, "")
    assert err.startswith("benchmarks: an emulated GPU's times are no GPU's: unset VITKERNELS_BACKEND")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="what this run does in its first seconds is a CPU's")
def test_the_command_ends_in_time_with_a_report(tmp_path):
    start = time.perf_counter()
    run = command("--suite", "all", "--budget", "12", "--out", str(tmp_path))
    out, err = run.communicate(timeout=120)
    took = time.perf_counter() - start
    assert run.returncode == 0, err
    results = load(tmp_path / "results.json")
    assert results.complete
    assert results.elapsed_s < 12
    assert took < 12 + 15, "starting Python and torch counts, but not for so much"
    assert results.rows, "on two slow cores with another test beside it, too"
    assert results.left_out, "12 s are too few for all of it"
    assert "report.html" in out
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert html.escape(next(iter(results.left_out))) in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="what this run does in its first seconds is a CPU's")
def test_the_command_interrupted_still_reports(tmp_path):
    """By SIGTERM, as of a batch system; the tests of an import cut short send SIGINT."""
    run = command("--suite", "all", "--budget", "600", "--out", str(tmp_path))
    path = tmp_path / "results.json"
    end = time.perf_counter() + 60
    while not (path.exists() and load(path).ceilings) and time.perf_counter() < end:
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert not load(path).complete
    assert "interrupted" in (tmp_path / "report.md").read_text()
