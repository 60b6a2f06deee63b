"""Ctrl-C: one ends a command and all its processes, at once, with status 130 and without a traceback."""

import contextlib
import functools
import glob
import os
import pty
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from vitkernels.tools import _interrupt
from vitkernels.tools.cli import main

ROOT = Path(__file__).parents[1]
COMMAND = "import sys; from vitkernels.tools.cli import main; sys.exit(main(sys.argv[1:]))"
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Ctrl-C is answered on Linux")
SOON_S = 20.0  # a second where nothing else takes the processor
HOWS = ("terminal", "parent", "SIGTERM", "twice")


def start(*argv, paths=(), **options) -> subprocess.Popen:
    """Start Python in a process group of its own, as a shell does."""
    environment = os.environ | options.pop("env", {})
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*paths, ROOT]))
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options,
    )  # fmt: skip


def processes() -> dict[int, tuple[int, int]]:
    """Return the parent and the session of every living process."""
    found = {}
    for entry in filter(lambda entry: entry.name.isdigit(), Path("/proc").iterdir()):
        with contextlib.suppress(OSError):
            state, parent, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                found[int(entry.name)] = int(parent), int(session)
    return found


def below(root: int) -> set[int]:
    """Return the processes that live below ``root``, and in its session."""
    known, living = {root}, processes()
    while found := {pid for pid, (parent, session) in living.items() if parent in known or session == root} - known:
        known |= found
    return known - {root}


def wait_for(condition, process: subprocess.Popen, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "it did not get that far"
        time.sleep(0.02)


def interrupt(process: subprocess.Popen, how: str) -> str:
    """End ``process`` as ``how`` says, hold it to what it promises, and return what it wrote to stderr."""
    children = below(process.pid)
    began = time.monotonic()
    if how == "parent":
        process.send_signal(signal.SIGINT)
    elif how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        for _ in range(2 if how == "twice" else 1):
            os.killpg(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=SOON_S)  # which waits for each that holds the pipe, children too
        left = children | below(process.pid)
        while left and time.monotonic() < began + SOON_S:
            time.sleep(0.02)
            left &= set(processes())
        assert not left
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Error" not in errors
    return errors


ALL_COMMANDS = {
    "demo": ["-c", COMMAND, "demo"],
    "classify": ["-c", COMMAND, "classify", "image.png", "--model", "vit_tiny_patch16_224"],
    "explain": ["-c", COMMAND, "explain", "vit_tiny_patch16_224"],
    "verify": ["-c", COMMAND, "verify"],
    "inspect": ["-c", COMMAND, "inspect"],
    "traffic": ["-c", COMMAND, "inspect", "--traffic", "vit_tiny_patch16_224"],
    "module": ["-m", "vitkernels", "verify"],
    "benchmarks": ["-m", "benchmarks"],
    "everything": ["-m", "benchmarks", "everything"],
    "tune": ["-m", "benchmarks", "tune"],
    "report": ["-m", "benchmarks", "report", "results.json"],
    "page": ["-m", "benchmarks", "page", "--check"],
}


@pytest.mark.parametrize("how", ["terminal", "SIGTERM"])
@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_during_import(command, how, tmp_path):
    """Each command is caught within ``import torch``, in a folder where it could leave something."""
    stand_in, folder, there = tmp_path / "torch.py", tmp_path / "here", tmp_path / "there"
    stand_in.write_text(f"import pathlib, time\npathlib.Path({str(there)!r}).touch()\ntime.sleep(60)\n")
    folder.mkdir()
    process = start(*ALL_COMMANDS[command], paths=[tmp_path], cwd=folder)
    wait_for(there.exists, process)
    assert not interrupt(process, how)
    assert not list(folder.iterdir())


def test_while_verify_runs(tmp_path):
    out = tmp_path / "out.json"
    process = start("-c", COMMAND, "verify", "--cpu", "--only", "mutants/*", "--json", out, "--seed", "1")
    wait_for(lambda: len(below(process.pid)) >= min(2, len(os.sched_getaffinity(0))), process)
    interrupt(process, "parent")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("how", "jobs"), [("terminal", 2), ("parent", 1)])
def test_while_inspect_compiles(how, jobs, tmp_path):
    """While two workers import PyTorch, and where this process is within the compiler."""
    pytest.importorskip("triton")
    cache, dump = tmp_path / "cache", tmp_path / "dump"
    words = ["inspect", "--case", "deit3_base_patch16_224", "--jobs", jobs, "--dump", dump]
    process = start("-c", COMMAND, *words, env={"TRITON_CACHE_DIR": str(cache)})
    # Triton's folders come and go meanwhile, which pathlib's rglob does not forgive.
    written = functools.partial(glob.glob, str(cache / "*" / "*.ttgir"))
    wait_for(lambda: len(below(process.pid)) > jobs if jobs > 1 else bool(written()), process)
    interrupt(process, how)
    assert all("EXIT" in file.read_text() for file in dump.rglob("[!.]*.sass")), "half a file"


MECHANISM = """
import hashlib, multiprocessing, os, pathlib, signal, subprocess, sys, time
from vitkernels.tools import _interrupt

class Swallows:
    def __del__(self):
        ready()
        time.sleep(60)

def ready():
    print("ready", flush=True)

def child():
    subprocess.run(["sh", "-c", "trap '' INT TERM; setsid sleep 60 & echo ready; wait"])

if __name__ == "__main__":
    _interrupt.start()
"""
# In steps: a signal that comes just before C code sleeps does not wake it.
SLEEP = "[time.sleep(0.1) for _ in range(600)]"
WAITS = {
    "sleep": f"ready(); {SLEEP}",
    "in a destructor": "x = Swallows(); del x",
    "in C": "ready(); hashlib.pbkdf2_hmac('sha256', b'', b'', (1 << 31) - 1)",
    "in generated code": f"exec('ready(); {SLEEP}')",
    "forked": "exec('with _interrupt.pool(2, \"fork\") as pool: pool.submit(child).result()')",
    "spawned": "exec('with _interrupt.pool(2, \"spawn\") as pool: pool.submit(child).result()')",
    "a session of its own": "subprocess.run(['setsid', '-w', 'sh', '-c', 'echo ready; sleep 60'])",
    "at exit": f"import atexit; atexit.register(lambda: {SLEEP}); ready()",
}


@pytest.fixture
def script(tmp_path):
    """What starts :data:`MECHANISM` with a last line, and waits until it is ready."""

    def begin(line: str, **options) -> subprocess.Popen:
        path = tmp_path / "script.py"
        path.write_text(MECHANISM + "    " + line + "\n")
        process = start(path, **options)
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        return process

    return begin


# SIGTERM is answered between two steps of the main thread.
PLACES = [(wait, how) for wait in WAITS for how in HOWS if (wait, how) != ("in C", "SIGTERM")]


@pytest.mark.parametrize(("wait", "how"), PLACES)
def test_wherever_it_is(script, wait, how):
    assert not interrupt(script(WAITS[wait]), how)


def test_in_the_background(script):
    """A shell starts what runs in the background with SIGINT ignored."""
    interrupt(script(WAITS["sleep"], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)), "terminal")


def test_a_file_is_written_to_its_end(script, tmp_path):
    file = tmp_path / "file"
    line = (
        f"file = pathlib.Path({str(file)!r}).open('w')\n"
        "    with _interrupt.writing(): file.write('half'); file.flush(); ready(); time.sleep(0.5); "
        "file.write(' and half'); file.close()\n"
        "    time.sleep(60)"
    )
    interrupt(script(line), "terminal")
    assert file.read_text() == "half and half"


def test_at_a_terminal(tmp_path):
    """The key itself; the cursor, which a progress bar hides, is there again."""
    path = tmp_path / "script.py"
    path.write_text(f"{MECHANISM}    {WAITS['forked']}\n")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, str(path)], os.environ | {"PYTHONPATH": str(ROOT)})
    said = b""
    try:
        while b"ready" not in said:
            said += os.read(terminal, 1000)
        os.write(terminal, b"\x03")
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := os.read(terminal, 1000):
                said += piece
        status = os.waitpid(pid, 0)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert said.endswith(b"\x1b[?25h")
    assert b"Traceback" not in said


def test_a_worker_that_is_told_to_end_takes_nobody_along(script):
    line = (
        "with _interrupt.pool(1, 'fork') as pool:\n"
        "        pool.submit(int).result()\n"  # Python forgets a signal that comes while a process is being forked
        "        job = pool.submit(time.sleep, 60)\n"
        "        ready()\n"
        "        multiprocessing.active_children()[0].terminate()\n"
        # Not to stdout: what comes there with "ready" is read with it, and communicate() would not see it.
        "        print(type(job.exception()).__name__, file=sys.stderr)"
    )
    _, errors = script(line).communicate(timeout=60)
    assert errors == f"{BrokenProcessPool.__name__}\n"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_does_not_wait_where_its_block_fails(method):
    began = time.monotonic()
    with contextlib.suppress(ZeroDivisionError), _interrupt.pool(1, method) as pool:
        pool.submit(time.sleep, 120)
        raise ZeroDivisionError
    assert time.monotonic() - began < 60


def test_main_leaves_signals_as_they_were():
    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, ())

    before = state()
    with pytest.raises(SystemExit):
        main(["--version"])
    assert state() == before
    with _interrupt.answered(), _interrupt.answered():
        assert signal.SIGINT in state()[1]
    assert state() == before
