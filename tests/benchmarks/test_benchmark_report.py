"""Reports: losses stay, regressions are flagged, and pages hold what was measured."""

import copy
import dataclasses

import pytest

from benchmarks import environment
from benchmarks.__main__ import _keep, main
from benchmarks.formats import bytes_text, time_text
from benchmarks.goals import GOALS
from benchmarks.report import _blocks, changed, duels, to_html, to_markdown, write_report
from benchmarks.schema import Row, Times, load, save
from vitkernels.tools.tables import Table, markdown_table

VIT_B = "vit_base_patch16_224"


def timed(kind, name, provider, us, spread=0.05, **more) -> Row:
    fields = {"op": {"case": VIT_B, "mode": "forward"}, "model": {"case": "", "mode": "inference"}}[kind]
    times = Times(us, us * (1 - spread), us * (1 + spread), 20)
    row = Row(
        kind, name, provider=provider, time=times, batch=256, dtype="bf16", flops=10**9, bytes=10**6, **fields, **more
    )
    if row.ours:
        row.over_best_rival = 1.0
    return row


@pytest.fixture
def results(session):
    rows = [
        timed("model", VIT_B, "vitkernels", 2000.0, peak_bytes=2**31),
        timed("model", VIT_B, "timm", 2500.0, peak_bytes=2**32),
        timed("model", VIT_B, "compile", 1500.0),
        timed("op", "mlp", "vitkernels", 120.0),
        timed("op", "mlp", "torch", 100.0),
        timed("op", "layer_norm", "vitkernels", 10.0),
        timed("op", "layer_norm", "torch", 20.0),
        timed("op", "attention", "vitkernels", 99.0),
        timed("op", "attention", "torch", 100.0),
        Row("op", "attention", VIT_B, "<liger>", "forward", "bf16", 256, "wrong", "off | by one"),
        Row("cost", "call but for launches", "block", "vitkernels", "no grad", time=Times(74.0, 73.0, 75.0, 9)),
        Row("cost", "call but for launches", "attention", "vitkernels", "no grad", time=Times(5.0, 4.0, 6.0, 9)),
        Row("counted", "k", VIT_B, "vitkernels", "mlp", status="counted", figures={"registers": 100.0, "blocks": 2.0}),
        Row(
            "cost", "call but for launches", "an op without checks", "torch", "no grad", time=Times(15.0, 14.0, 16.0, 9)
        ),
    ]
    for row in rows:
        if row.ours and row.kind in ("op", "model"):
            rivals = [r for r in rows if r.workload == row.workload and not r.ours and r.time]
            row.over_best_rival = min(r.time.median for r in rivals) / row.time.median
    session.results.rows = rows
    session.results.left_out = {"the rest": "no time left in the budget"}
    session.results.complete = True
    session.results.ceilings = {"tflops bf16": 100.0, "gb_per_s": 1000.0}
    return session.results


def test_losses_stay_and_name_the_op(results):
    text = to_markdown("t", list(_blocks(results, None)))
    lost = text.partition("## Where we lose")[2].partition("##")[0]
    assert f"| {VIT_B}, inference, bf16, batch 256 | compile | mlp (0.83 ×) | 0.75 |" in lost
    assert "mlp, vit_base_patch16_224, forward, bf16, batch 256 | torch | mlp | 0.83 |" in lost
    assert "attention" not in lost, "within the spread"
    assert "faster than the best of them beyond the spread in 1, level in 1, slower in 2. Wrong results: 1." in text


def test_a_wrong_row_is_listed_with_its_reason_and_no_time(results):
    text = to_markdown("t", list(_blocks(results, None)))
    absent = text.partition("## Not measured, and why")[2]
    assert ": <liger> | wrong | off ¦ by one |" in absent
    assert "| the rest | left out | no time left in the budget |" in absent
    page = to_html("a <b>", list(_blocks(results, None)))
    assert "&lt;liger&gt;" in page
    assert "<b>" not in page.partition("<body>")[2]


def test_goals(results):
    verdicts = {goal.text: goal.verdict(results) for goal in GOALS}
    (calls,) = [v for text, v in verdicts.items() if "launches, no grad" in text]
    assert calls == ("74", "not met")
    (inference,) = [v for text, v in verdicts.items() if "inference, bf16, batch 256" in text]
    assert inference == ("0.75", "not met")
    results.rows[0].time = Times(1000.0, 1000.0, 1000.0, 9)
    assert [g.verdict(results) for g in GOALS if "inference, bf16, batch 256" in g.text] == [("1.5", "met")]
    assert [g.verdict(results)[1] for g in GOALS if "memory" in g.text] == ["not measured: it is for a GPU"]
    results.rows[0].mode = results.rows[1].mode = "training"
    assert [g.verdict(results) for g in GOALS if "memory" in g.text] == [("2", "met")]


def test_regressions_are_flagged_beyond_the_spread_alone(results):
    assert changed(results, results) == []
    after = copy.deepcopy(results)
    after.rows[3].time = Times(130.0, 125.0, 140.0, 9)  # was 114 – 126: within
    after.rows[5].time = Times(8.0, 7.9, 8.1, 9)
    after.rows[7].time = Times(130.0, 125.0, 140.0, 9)  # was 94 – 104
    after.rows[12].figures = {"registers": 90.0, "blocks": 1.0}
    found = {(c.name.partition(",")[0], c.what): c.worse for c in changed(results, after)}
    assert found == {
        ("attention", "time"): True,
        ("layer_norm", "time"): False,
        ("k", "registers"): False,
        ("k", "blocks"): True,
    }
    assert [c.worse for c in changed(results, after)] == [True, True, False, False]
    right = copy.deepcopy(after)
    right.rows[9] = dataclasses.replace(timed("op", "attention", "<liger>", 1.0))
    assert [c.worse for c in changed(right, after) if c.what == "result"] == [True]
    assert [c.worse for c in changed(after, right) if c.what == "result"] == [False]


def test_the_report_command(results, tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    save(results, a)
    assert main(["report", str(a), "--out", str(tmp_path / "one")]) == 0
    assert {file.name for file in (tmp_path / "one").iterdir()} >= {"report.md", "report.html", "speed.png"}
    assert main(["report", str(a), str(a)]) == 0
    results.rows[3].time = Times(200.0, 190.0, 210.0, 9)
    save(results, b)
    assert main(["report", str(a), str(b)]) == 1
    said = capsys.readouterr().out
    assert "1 worse, 0 better" in said
    assert "| mlp, vit_base_patch16_224, forward, bf16, batch 256: vitkernels | time | 120 µs" in said
    assert main(["report", str(b), str(a)]) == 0, "it became faster"
    b.write_text("{}")
    assert main(["report", str(b)]) == 2


def test_another_device_is_told(results):
    other = copy.deepcopy(results)
    other.device["name"] = "GPU"
    text = to_markdown("t", list(_blocks(other, results)))
    assert "The devices differ" in text


def test_pictures_are_pictures(results, tmp_path):
    for row in results.rows:
        if row.kind == "op" and row.time:
            row.of_roofline = 0.5
    files = write_report(results, tmp_path)
    pictures = {file.stem: file.read_bytes() for file in files if file.suffix == ".png"}
    assert set(pictures) == {"throughput", "memory", "speed", "roofline", "calls"}
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in pictures.values())
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(pictures)
    assert 'src="http' not in page


def test_an_empty_run_has_a_report(session, tmp_path):
    files = write_report(session.results, tmp_path)
    assert {file.name for file in files} == {"report.md", "report.html"}
    assert "interrupted" in (tmp_path / "report.md").read_text()


def test_duels_take_the_best_of_each_side(results):
    pairs = {(ours.name, ours.provider, rival.provider) for ours, rival in duels(results.rows)}
    assert (VIT_B, "vitkernels", "compile") in pairs
    assert len(pairs) == 4


def test_wording():
    assert [time_text(us) for us in (0.5, 81.24, 1234.0, 2.5e6)] == ["0.5 µs", "81.2 µs", "1.23 ms", "2.5 s"]
    assert [bytes_text(n) for n in (10, 2048, 3 * 2**30)] == ["10 B", "2 KiB", "3 GiB"]
    assert markdown_table(Table(("a", "b"), [("x|y", "1")])).splitlines()[1:] == ["| --- | ---: |", "| x¦y | 1 |"]


def test_what_is_kept_is_measured_and_the_devices_newest(results, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    counted = [row for row in results.rows if row.status == "counted"]
    assert counted
    for date in ("2026-11-27", "2026-11-28"):
        results.date = f"{date}T12:00:00+00:00"
        save(results, tmp_path / "run.json")
        kept = _keep(tmp_path / "run.json")
    assert [*kept.parent.iterdir()] == [kept] and kept.name.startswith("2026-11-28")
    rows = load(kept).rows
    assert rows == [row for row in results.rows if row not in counted]
    assert sum(line.lstrip().startswith('{"kind"') for line in kept.read_text().splitlines()) == len(rows), (
        "a row a line"
    )
