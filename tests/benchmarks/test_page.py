"""The results in docs/benchmarks.md: made from kept runs, never typed."""

import dataclasses

import pytest

from benchmarks.page import BEGIN, END, update
from benchmarks.schema import Row, Times, save
from vitkernels.tools.console import UserError


def test_the_newest_run_of_each_device(session, tmp_path):
    page, kept = tmp_path / "benchmarks.md", tmp_path / "results"
    kept.mkdir()
    page.write_text("# Title\nno marks\n")
    with pytest.raises(UserError, match="has no lines"):
        update(page, kept)
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert update(page, kept)
    assert "No run is kept yet." in page.read_text()

    row = Row("cost", "call but for launches", "block", "vitkernels", "no grad", time=Times(14.0, 13.0, 15.0, 9))
    for date, us in (("2026-11-20", 14.0), ("2026-11-22", 7.5), ("2026-11-21", 30.0)):
        row = dataclasses.replace(row, time=Times(us, us, us, 9))
        save(dataclasses.replace(session.results, date=date, rows=[row]), kept / "cpu" / f"{date}-abc.json")
    gpu = session.results.device | {"name": "Some GPU", "kind": "cuda"}
    save(dataclasses.replace(session.results, device=gpu, date="2026-01-01"), kept / "some-gpu" / "x.json")

    assert update(page, kept, write=False)
    assert update(page, kept)
    assert not update(page, kept), "a second time changes nothing"
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n**Some GPU**"), "GPUs come first"
    assert text.endswith(f"{END}\n\nafter\n")
    assert "2026-11-22" in text
    assert "| 7.5 | met |" in text
    assert "2026-11-21" not in text
    assert "| ViT-B/16 forward on a CPU" in text.partition("2026-11-22")[2]


def test_the_page_is_up_to_date():
    assert not update(write=False), "python -m benchmarks page"
