"""The JSON: what is written comes back, and what breaks the schema is refused by name."""

import dataclasses
import json

import pytest

from benchmarks.schema import Row, Times, check, load, save


@pytest.fixture
def results(session):
    session.results.rows = [
        Row("op", "mlp", "c", "torch", "both", "bf16", 32, time=Times(1.0, 0.9, 1.2, 7), flops=10, bytes=20, error=0.1),
        Row("op", "mlp", "c", "liger", "both", "bf16", 32, "wrong", "off by one"),
        Row("counted", "mlp", "c", "formula", "both", status="counted", figures={"registers": 12.0}),
    ]
    return session.results


def test_round_trip(results, path):
    save(results, path)
    assert load(path) == results
    assert [file.name for file in path.parent.iterdir()] == [path.name], "the temporary file is left"


def document(results):
    return json.loads(json.dumps(dataclasses.asdict(results)))


@pytest.mark.parametrize(
    ("breach", "says"),
    [
        (lambda d: d.update(schema=2), "schema 1"),
        (lambda d: d.pop("commit"), "expected the fields"),
        (lambda d: d.update(extra=1), "expected the fields"),
        (lambda d: d.update(budget_s="long"), "budget_s is a str"),
        (lambda d: d.update(complete=1), "complete is a int"),
        (lambda d: d["versions"].update(torch=2), r"versions\.torch is a int"),
        (lambda d: d["rows"][0].update(batch=1.5), r"rows\[0\]\.batch is a float"),
        (lambda d: d["rows"][0]["time"].update(median=None), r"rows\[0\]\.time\.median is a NoneType"),
        (lambda d: d["rows"][0]["time"].pop("samples"), r"rows\[0\]\.time: expected the fields"),
        (lambda d: d["rows"][0].update(kind="guess"), r"rows\[0\]\.kind is 'guess'"),
        (lambda d: d["rows"][0].update(status="fine"), r"rows\[0\]\.status is 'fine'"),
        (lambda d: d["rows"][1].update(reason=""), r"rows\[1\]: a wrong row has no reason"),
        (lambda d: d["rows"][0].update(reason="why"), r"rows\[0\]: a measured row has a reason"),
        (lambda d: d["rows"][1].update(time=d["rows"][0]["time"]), r"rows\[1\]: only measured and counted rows"),
        (lambda d: d["rows"][0].update(time=None), r"rows\[0\]: only measured and counted rows"),
        (lambda d: d["rows"].append(d["rows"][0]), r"rows\[3\]: a second row of"),
    ],
)
def test_breaches_are_refused(results, breach, says):
    broken = document(results)
    breach(broken)
    with pytest.raises(ValueError, match=says):
        check(broken, "x.json")


def test_what_breaks_the_schema_is_never_written(results, path):
    save(results, path)
    good = path.read_bytes()
    results.rows.append(results.rows[0])
    with pytest.raises(ValueError, match="a second row"):
        save(results, path)
    results.rows[-1] = dataclasses.replace(results.rows[0], provider="x", error=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(results, path)
    assert path.read_bytes() == good


def test_no_json(path):
    path.write_text("{")
    with pytest.raises(ValueError, match=r"results\.json"):
        load(path)
