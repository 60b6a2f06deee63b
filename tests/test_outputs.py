"""Where results go: found out before the work, written whole or not at all, never on another file."""

import os
import sys

import pytest

from vitkernels.tools import cli
from vitkernels.tools.console import UserError, check_can_fill, check_can_write, write_file

COMMANDS = {
    "demo": (["demo"], ["--out"]),
    "classify": (["classify", "IMAGE", "--model", "vit_tiny_patch16_224"], ["--out"]),
    "verify": (["verify"], ["--json", "--junit", "--html"]),
    "inspect": (["inspect"], ["--json"]),
    "traffic": (["inspect", "--traffic", "vit_tiny_patch16_224"], ["--json"]),
}
OPTIONS = [(name, option) for name, (_, options) in COMMANDS.items() for option in options]


@pytest.fixture
def no_work(monkeypatch):
    """Fail where a command starts its work."""

    def started(args):
        raise AssertionError("the work was started")

    for name in ("_demo", "_classify", "_verify", "_inspect"):
        monkeypatch.setattr(cli, name, started)


def refusal(capsys, argv) -> str:
    assert cli.main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vitkernels: cannot write ")
    return line


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_outputs_that_cannot_be_written(command, option, no_work, tmp_path, capsys):
    argv = [*COMMANDS[command][0], option]
    (tmp_path / "file").write_text("as it was")
    missing, below = tmp_path / "missing" / "a", tmp_path / "file" / "a"
    assert f"{missing}: there is no folder {missing.parent}" in refusal(capsys, [*argv, missing])
    assert f"{below}: there is no folder {below.parent}" in refusal(capsys, [*argv, below])
    assert f"{tmp_path}: it is a folder" in refusal(capsys, [*argv, tmp_path])
    assert "File name too long" in refusal(capsys, [*argv, tmp_path / ("a" * 300)])
    with pytest.raises(AssertionError, match="the work was started"):
        cli.main([str(word) for word in (*argv, tmp_path / "fine")])
    with pytest.raises(AssertionError, match="the work was started"):
        cli.main([str(word) for word in (*argv, tmp_path / "file")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "looking leaves nothing behind"
    assert (tmp_path / "file").read_text() == "as it was"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_that_may_not_be_written(no_work, tmp_path, capsys):
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in refusal(capsys, ["demo", "--out", tmp_path / "a.png"])
    finally:
        tmp_path.chmod(0o700)


def test_no_output_lies_on_another_file(no_work, tmp_path, capsys):
    image, weights, results = tmp_path / "a.png", tmp_path / "w.pt", tmp_path / "results"
    image.touch()
    weights.touch()
    argv = ["classify", image, "--model", "vit", "--weights", weights, "--out"]
    assert "a.png: it is given twice" in refusal(capsys, [*argv, tmp_path / ".." / tmp_path.name / "a.png"])
    assert "w.pt: it is given twice" in refusal(capsys, [*argv, weights])
    assert "results: it is given twice" in refusal(capsys, ["verify", "--json", results, "--html", results])


def test_inspects_folders(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from vitkernels.tools.aot import inspect

    def started(*args):
        raise AssertionError("the work was started")

    monkeypatch.setattr(inspect, "find_launches", started)
    (tmp_path / "file").touch()
    for options in ({"dump": tmp_path / "file"}, {"dump": tmp_path / "file" / "a"}):
        with pytest.raises(UserError, match=r"cannot write to .*file.*: it is no folder"):
            inspect.inspect(["sm_90"], **options)
    with pytest.raises(UserError, match="it is no folder"):
        inspect.inspect(["sm_90"], update=True, folder=tmp_path / "file")
    with pytest.raises(AssertionError, match="the work was started"):
        inspect.inspect(["sm_90"], dump=tmp_path / "new" / "folder")


def test_benchmarks_folders(tmp_path, monkeypatch, capsys):
    from benchmarks import __main__, suites

    def started(*args, **kwargs):
        raise AssertionError("the work was started")

    monkeypatch.setenv("VITKERNELS_BACKEND", "auto")
    monkeypatch.setattr(suites, "run_suite", started)
    (tmp_path / "file").touch()
    assert __main__.main(["--out", str(tmp_path / "file")]) == 2
    assert "file: it is no folder" in capsys.readouterr().err
    (tmp_path / "taken" / "results.json").mkdir(parents=True)
    assert __main__.main(["--out", str(tmp_path / "taken")]) == 2
    assert "results.json: it is a folder" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="the work was started"):
        __main__.main(["--out", str(tmp_path / "new" / "folder")])
    assert __main__.main(["report", str(tmp_path / "none" / "a.json")]) == 2
    assert not (tmp_path / "none").exists()


def test_examples_look_first(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.syspath_prepend(str(cli.Path(__file__).parents[1] / "examples"))
    import train_digits

    monkeypatch.setattr(sys, "argv", ["train_digits", "--out", str(tmp_path / "missing" / "a")])
    monkeypatch.setattr(train_digits, "train", lambda *args: pytest.fail("it was trained"))
    with pytest.raises(SystemExit) as stopped:
        train_digits.main()
    assert stopped.value.code == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_write_that_fails_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "picture"
    path.write_bytes(b"older")

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cli.Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"cannot write .*picture: No space left on device"):
            write_file(path, b"newer")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("picture", b"older")]
    write_file(path, "newer é")
    assert path.read_text(encoding="utf-8") == "newer é"


def test_links_and_devices_stay_what_they_are(tmp_path):
    """Written at once, a file takes the place of what was there: of a link, or of /dev/null where root runs this."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    check_can_write(tmp_path / "link")
    assert not (tmp_path / "target").exists()
    write_file(tmp_path / "link", b"text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"text"
    os.mkfifo(tmp_path / "pipe")
    check_can_write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    device = cli.Path("/dev/null")
    check_can_write(device)
    write_file(device, "text")
    assert device.is_char_device()


def test_folders_are_made(tmp_path):
    check_can_fill(tmp_path / "a" / "b")
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "b"]
    assert not any((tmp_path / "a" / "b").iterdir())
