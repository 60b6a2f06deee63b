"""Tuning tables: what is looked up, and what a table must hold."""

import copy
import json

import pytest

from vitkernels import tuning

ROW = {
    "config": {"block_m": 64, "provider": "triton"},
    "median_us": 81.2,
    "p20_us": 80,
    "p80_us": 81.7,
    "heuristic_us": 94.0,
    "date": "2026-11-21",
    "versions": {"torch": "2.13.0", "triton": "3.7.1"},
}
TABLE = {"schema": 1, "device": "Some GPU", "entries": {"linear": {"N=1": ROW}}}


def test_tables_in_the_repository_pass():
    folder = tuning.resources.files("vitkernels.tuning") / "tables"
    for file in folder.iterdir():
        if file.name.endswith(".json"):
            table = json.loads(file.read_text())
            tuning.check_table(table, file.name)
            assert tuning.table_name(table["device"]) == file.name


def test_lookup(tmp_path, monkeypatch):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "some-gpu.json").write_text(json.dumps(TABLE))
    monkeypatch.setattr(tuning.resources, "files", lambda package: tmp_path)
    tuning._table.cache_clear()
    try:
        assert tuning.lookup("linear", "Some GPU", "N=1") == ROW["config"]
        assert tuning.lookup("linear", "Some GPU", "N=2") is None
        assert tuning.lookup("mlp", "Some GPU", "N=1") is None
        assert tuning.lookup("linear", "No Such GPU", "N=1") is None
    finally:
        tuning._table.cache_clear()


@pytest.mark.parametrize(
    ("breach", "says"),
    [
        (lambda t: t.update(schema=0), "schema 1"),
        (lambda t: t.pop("device"), "device's name"),
        (lambda t: t.update(entries=[]), "entries is a list"),
        (lambda t: t["entries"].update(linear=[]), "entries.linear is a list"),
        (lambda t: t["entries"]["linear"]["N=1"].pop("date"), "must hold"),
        (lambda t: t["entries"]["linear"]["N=1"].update(more=1), "must hold"),
        (lambda t: t["entries"]["linear"]["N=1"].update(median_us="1"), "median_us is a str; expected a number"),
        (lambda t: t["entries"]["linear"]["N=1"].update(p20_us=True), "p20_us is a bool; expected a number"),
        (lambda t: t["entries"]["linear"]["N=1"].update(date=2), "date is a int; expected a string"),
        (lambda t: t["entries"]["linear"]["N=1"].update(config=1), "config is a int; expected an object"),
        (lambda t: t["entries"]["linear"]["N=1"]["versions"].update(torch=2), "versions.torch is a int"),
        (lambda t: t["entries"]["linear"]["N=1"]["config"].update(block_m=1.5), "config.block_m is a float"),
    ],
)
def test_breaches_are_refused(breach, says):
    table = copy.deepcopy(TABLE)
    assert tuning.check_table(table, "x") == {"linear": {"N=1": ROW["config"]}}
    breach(table)
    with pytest.raises(ValueError, match=says) as error:
        tuning.check_table(table, "some-gpu.json")
    assert "some-gpu.json" in str(error.value)
