"""README.md's results: made from kept runs, never typed."""

import dataclasses

import pytest

from benchmarks.readme import BEGIN, END, update
from benchmarks.schema import Row, Times, save
from vitkernels.console import UserError


def test_the_newest_run_of_each_device(session, tmp_path):
    readme, kept = tmp_path / "README.md", tmp_path / "results"
    kept.mkdir()
    readme.write_text("# Title\nno marks\n")
    with pytest.raises(UserError, match="has no lines"):
        update(readme, kept)
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert update(readme, kept)
    assert "No run is kept yet." in readme.read_text()

    row = Row("cost", "call but for launches", "block", "vitkernels", "no grad", time=Times(14.0, 13.0, 15.0, 9))
    for date, us in (("2026-11-20", 14.0), ("2026-11-22", 7.5), ("2026-11-21", 30.0)):
        row = dataclasses.replace(row, time=Times(us, us, us, 9))
        save(dataclasses.replace(session.results, date=date, rows=[row]), kept / "cpu" / f"{date}-abc.json")
    gpu = session.results.device | {"name": "Some GPU", "kind": "cuda"}
    save(dataclasses.replace(session.results, device=gpu, date="2026-01-01"), kept / "some-gpu" / "x.json")

    assert update(readme, kept, write=False)
    assert update(readme, kept)
    assert not update(readme, kept), "a second time changes nothing"
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n**Some GPU**"), "GPUs come first"
    assert text.endswith(f"{END}\n\nafter\n")
    assert "2026-11-22" in text
    assert "| 7.5 | met |" in text
    assert "2026-11-21" not in text
    assert "| ViT-B/16 forward on a CPU" in text.partition("2026-11-22")[2]
