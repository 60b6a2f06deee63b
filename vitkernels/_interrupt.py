"""Ctrl-C, answered: it ends a command at once, with every process that it started, and exit status 130.

Python would raise KeyboardInterrupt in the main thread, between two steps of its own: not while a compiler or a product
runs, and otherwise anywhere, as within an import, in a destructor that swallows it, or where a pool waits for what its
workers have in hand. And as a terminal sends SIGINT to each process of a command, each would print its traceback.

So SIGINT is blocked here, and children are born deaf to it. One thread waits for it, ends the whole tree below this
process, and then the process. SIGTERM is handed on to that thread. All this is for Linux, where Triton runs:
elsewhere :func:`start` does nothing, and KeyboardInterrupt comes as ever.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

STATUS = 130  # 128 + SIGINT, as shells count
PATIENCE_S = 1.0  # for a file that is being written, and again for children to be gone

_watch: _Watch | None = None
_writing = threading.RLock()


def start() -> None:
    """Answer SIGINT and SIGTERM from now on, to the process's end; in the main thread alone."""
    global _watch
    main = threading.current_thread() is threading.main_thread()
    if _watch is None and main and os.path.exists("/proc/self/stat"):
        _watch = _Watch()


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Answer SIGINT and SIGTERM within, as :func:`start` does, and leave all as it was before."""
    global _watch
    before = _watch
    start()
    try:
        yield
    finally:
        if _watch is not before:
            _watch.stop()
            _watch = None


@contextlib.contextmanager
def at_the_end(do: Callable[[], None]) -> Iterator[None]:
    """Call ``do`` last where an interrupt comes within: beside the main thread, which has been halted anywhere.

    It must import nothing and take no lock; it may replace the process by another.
    """
    if _watch is None:
        yield
        return
    _watch.last = do
    try:
        yield
    finally:
        _watch.last = None


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Let an interrupt wait, though no longer than a second, until the file that is written within is whole."""
    with _writing:
        yield


@contextlib.contextmanager
def pool(workers: int, method: str) -> Iterator:
    """Yield an executor of ``workers`` processes, which an exception that leaves the block kills and does not wait for.

    Args:
        workers: How many.
        method: ``fork`` or ``spawn``, as :func:`multiprocessing.get_context` takes it.
    """
    import concurrent.futures
    import multiprocessing

    if method == "spawn":
        _quiet_resource_tracker()
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context(method)
    executor = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_it_to_the_parent)
    try:
        yield executor
    except BaseException:
        _end_trees(child.pid for child in set(multiprocessing.active_children()) - before)
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()


def _leave_it_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _quiet_resource_tracker() -> None:
    """Start what removes a pool's semaphores when all is over; killed workers leave some, of which it would warn."""
    from multiprocessing import resource_tracker

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    sys.warnoptions.append("ignore:resource_tracker")  # which it takes over
    resource_tracker.ensure_running()  # which unblocks SIGINT, whoever blocked it
    sys.warnoptions.pop()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Watch:
    """The thread that waits for SIGINT, and what was before it."""

    def __init__(self):
        self.pid, self.ending, self.over = os.getpid(), False, False
        self.last: Callable[[], None] | None = None
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        # SIGINT's is for threads from before, which do not block it. A shell starts what runs in the background with
        # SIGINT ignored: that ends here.
        self.handlers = {number: signal.signal(number, self._hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        self.thread = threading.Thread(target=self._wait, name="Ctrl-C", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.over = True
        signal.pthread_kill(self.thread.ident, signal.SIGINT)
        self.thread.join()
        for number, handler in self.handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    def _hand_on(self, *_) -> None:
        if os.getpid() != self.pid:  # forked, and without the thread
            os._exit(STATUS)
        while self.ending:  # nothing more may be printed or written: all children are about to fail
            time.sleep(PATIENCE_S)
        signal.pthread_kill(self.thread.ident, signal.SIGINT)

    def _wait(self) -> None:
        signal.sigwait({signal.SIGINT})
        if self.over:
            return
        _writing.acquire(timeout=PATIENCE_S)
        self.ending = True
        _thread.interrupt_main()  # to halt it
        _end_trees(pid for pid, (parent, _) in _processes().items() if parent == self.pid)
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
        if self.last is not None:
            # Some senders, as timeout(1), send it twice.
            while signal.sigtimedwait({signal.SIGINT}, 0) is not None:
                pass
            self.last()
        os._exit(STATUS)  # no handler of the exit, and no pool, to wait for


def _end_trees(roots: Iterable[int]) -> None:
    """Kill the processes ``roots`` with all below them, and wait until they are gone.

    They are stopped first: one that starts others meanwhile would leave them behind as nobody's children.
    """
    known: set[int] = set()
    found = {pid for pid in roots if not _tracks_resources(pid)}
    while found:
        for pid in found:
            _send(pid, signal.SIGSTOP)
        known |= found
        found = {pid for pid, (parent, _) in _processes().items() if parent in known} - known
    for pid in known:
        _send(pid, signal.SIGKILL)
    end = time.monotonic() + PATIENCE_S
    while known and time.monotonic() < end:
        time.sleep(0.01)
        processes = _processes()
        known = {pid for pid in known if pid in processes and processes[pid][1] != "Z"}


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _processes() -> dict[int, tuple[int, str]]:
    """Return the parent and the state of every process; see proc_pid_stat(5)."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]
            found[int(name)] = int(parent), state.decode()
    return found


def _tracks_resources(pid: int) -> bool:
    """Tell whether ``pid`` is the process of multiprocessing that cleans up, and ends, when all others are gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"multiprocessing.resource_tracker" in file.read()
    return False
