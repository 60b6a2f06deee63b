"""The forms of verify's report: they agree with each other, they parse, and nothing in a detail breaks them."""

import json
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from vitkernels.tools.console import UserError
from vitkernels.tools.verify import report
from vitkernels.tools.verify.report import summary
from vitkernels.tools.verify.results import Result, Verification

HOSTILE = "expected <script>alert('&')</script> \"quoted\" \x1b[31mred\x1b[0m \x00 end"
MLP = "accuracy/mlp/10 tokens of 40 channels/fp32"
RESULTS = [
    Result(MLP, "output 0", "passed", "max error 1e-07 at (0, 1), limit 2e-07", 1.25, "fp32", 0.5),
    Result(MLP, "dw1", "failed", "max error 0.0148 at (3, 17), limit 2.1e-06", 20556.1, "fp32", 0.5),
    Result(MLP, "db1", "failed", HOSTILE, float("inf"), "fp32", 0.5),
    Result("accuracy/mlp/10 tokens of 40 channels/bf16", "output 0", "passed", "", 0.97, "bf16", 0.25),
    Result("memory/linear/12 tokens/fp32", "guard bands", "broken", "no allocation was guarded", None, "fp32", 0.1),
    Result("integration/cuda-graph/mlp", "plain", "skipped", "no GPU"),
    Result("integration/cuda-graph/linear", "plain", "skipped", "no GPU"),
    Result("integration/second-device/mlp", "plain", "skipped", "one GPU only"),
    Result("mutants/linear: no bias gradient", "caught", "passed", "by accuracy/linear", 30.0, "fp32"),
    Result("mutants/mlp: tanh for erf", "caught", "skipped", "survived accuracy/mlp", None, "fp32"),
    Result("mutants", "caught", "broken", "1 of 2"),
]


def verification(results=RESULTS):
    environment = {"vitkernels": "0.1", "torch": "2.13.0", "python": "3.11", "device": "CPU, emulated H100",
                   "system": "Linux <x86_64>", "date": "2026-11-21T03:30:00+00:00"}  # fmt: skip
    return Verification(environment, "vitkernels verify --quick --cpu", list(results), 41.7)


@pytest.fixture
def printed(capsys):
    def run(results=RESULTS):
        report.print_report(verification(results))
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("results", "code", "last"),
    [
        (RESULTS[:1], 0, "Passed."),
        (RESULTS, 1, "Failed: numbers or behaviour are wrong."),
        ([RESULTS[0], RESULTS[4]], 2, "Invalid: a check could not run, or the self-test let a seeded defect through."),
        (RESULTS[5:8], 3, "Nothing was verified."),
        ([], 3, "Nothing was verified."),
    ],
)
def test_every_form_gives_the_verdict(results, code, last, printed):
    v = verification(results)
    assert v.exit_code == code
    assert printed(results).splitlines()[-1] == last
    assert json.loads(report.to_json(v))["exit_code"] == code
    assert last in report.to_html(v)
    ElementTree.fromstring(report.to_junit(v))


def test_terminal_tells_what_failed_and_how_to_repeat_it(printed):
    text = printed()
    for part in ("dw1: max error 0.0148 at (3, 17), limit 2.1e-06", f"--only '{MLP}'", "no allocation was guarded",
                 "no GPU: integration/cuda-graph (2)", "one GPU only: integration/second-device (1)",
                 "Seeded defects: 1 of 2 caught.", "mlp: tanh for erf: survived accuracy/mlp"):  # fmt: skip
        assert part in text
    assert text.count(f"--only '{MLP}'") == 1, "one command repeats both failures"
    assert max(map(len, text.splitlines())) <= 120


def test_success_is_short(printed):
    text = printed(RESULTS[:1])
    for word in ("Failed", "Skipped", "Seeded", "Could not", "--only"):
        assert word not in text
    assert len(text.splitlines()) == 10


def test_counts_agree():
    v = verification()
    by_group = {row[0]: row[1:6] for row in summary.by_group(v).rows}
    assert by_group["accuracy"] == ("4", "2", "2", "0", "0")
    assert by_group["integration"] == ("3", "0", "0", "3", "0")
    assert sum(int(row[0]) for row in by_group.values()) == len(RESULTS)
    for column, status in enumerate(summary.COUNTS, start=1):
        assert sum(int(row[column]) for row in by_group.values()) == len(v.by_status(status))
    root = ElementTree.fromstring(report.to_junit(v))
    assert [int(root.get(name)) for name in ("tests", "failures", "errors")] == [len(RESULTS), 2, 2]
    for suite in root:
        cases = suite.findall("testcase")
        assert len(cases) == int(suite.get("tests"))
        for attribute, child in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert len(suite.findall(f"testcase/{child}")) == int(suite.get(attribute))
    assert sum(int(suite.get("tests")) for suite in root) == len(RESULTS)


def test_worst_ratio_by_op_and_dtype():
    rows = {row[:2]: row[2] for row in summary.by_op(verification()).rows}
    assert rows == {("mlp", "bf16"): "0.97", ("mlp", "fp32"): "∞", ("linear", "fp32"): ""}
    nan = Result(MLP, "dx", "failed", "", float("nan"), "fp32")
    assert summary.by_op(verification([*RESULTS[:2], nan])).rows[0][2] == "∞"
    assert summary.by_op(verification(RESULTS[:2])).rows[0][2] == "2.06e+04"


def test_json_round_trip():
    data = json.loads(report.to_json(verification()), parse_constant=pytest.fail)
    assert Verification(
        data["environment"], data["command"], [Result(**r) for r in data["results"]], data["seconds"]
    ) == verification([*RESULTS[:2], Result(MLP, "db1", "failed", HOSTILE, None, "fp32", 0.5), *RESULTS[3:]])


# The schema that Jenkins's xUnit plugin checks with (and GitHub's and GitLab's readers take): what may stand where.
ATTRIBUTES = {
    "testsuites": {"name", "time", "tests", "failures", "disabled", "errors"},
    "testsuite": {"name", "tests", "failures", "errors", "time", "disabled", "skipped", "timestamp", "hostname", "id",
                  "package"},
    "properties": set(),
    "property": {"name", "value"},
    "testcase": {"name", "assertions", "time", "classname", "status"},
    "skipped": {"message", "type"}, "failure": {"message", "type"}, "error": {"message", "type"},
}  # fmt: skip
CHILDREN = {
    "testsuites": {"testsuite"},
    "testsuite": {"properties", "testcase"},
    "properties": {"property"},
    "testcase": {"skipped", "failure", "error"},
}


def test_junit_follows_the_schema():
    root = ElementTree.fromstring(report.to_junit(verification()))
    assert root.tag == "testsuites"
    for element in root.iter():
        assert set(element.keys()) <= ATTRIBUTES[element.tag]
        assert {child.tag for child in element} <= CHILDREN.get(element.tag, set())
    for suite in root:
        assert [child.tag for child in suite].index("properties") == 0
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
        assert float(suite.get("time")) == pytest.approx(sum(float(c.get("time")) for c in suite.findall("testcase")))
        properties = {p.get("name"): p.get("value") for p in suite.findall("properties/property")}
        assert properties["system"] == "Linux <x86_64>"
    names = [case.get("name") for case in root.iter("testcase")]
    assert len(set(names)) == len(names)
    failure = root.find(".//failure[@message='dw1: max error 0.0148 at (3, 17), limit 2.1e-06']")
    assert f"--only '{MLP}'" in failure.text
    assert "<script>alert('&')</script>" in root.find(".//testcase[3]/failure").text


class Page(HTMLParser):
    """A page's tags, text and the addresses that it would fetch; an element that is not closed is an error."""

    VOID = frozenset({"meta"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.fetched = set(), [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def test_html_is_whole_escaped_and_self_contained():
    text = report.to_html(verification())
    page = Page(text)
    assert "script" not in page.tags
    assert not page.fetched
    assert "url(" not in text
    assert "@import" not in text
    shown = " ".join(page.text)
    assert "<script>alert('&')</script>" in shown
    assert "Linux <x86_64>" in shown
    assert shown.index("dw1") < shown.index("By op and dtype"), "what failed comes first"
    for result in RESULTS:
        assert result.name in shown
        assert (result.check.partition("/")[2] or result.check) in shown


def test_writing(tmp_path):
    v = verification()
    for write, to, name in (
        (report.write_json, report.to_json, "a.json"),
        (report.write_junit, report.to_junit, "a.xml"),
        (report.write_html, report.to_html, "a.html"),
    ):
        path = tmp_path / name
        path.write_text("old")
        write(v, path)
        assert path.read_text(encoding="utf-8") == to(v)
        with pytest.raises(UserError, match="there is no folder"):
            write(v, tmp_path / "missing" / name)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder\.json: "):
        report.write_json(v, tmp_path / "folder.json")
    assert sorted(os.listdir(tmp_path)) == ["a.html", "a.json", "a.xml", "folder.json"], "no part is left"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full_disk(self, text, encoding):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        report.write_json(verification(), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]
