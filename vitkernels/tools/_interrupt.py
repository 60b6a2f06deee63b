"""Make Ctrl-C end a command at once, with every process that it started, and exit status 130.

Python itself raises KeyboardInterrupt in the main thread between two bytecodes. That is too late while a compiler or a
matrix product runs, and otherwise it can happen anywhere: within an import, in a destructor that swallows it, or while
a pool waits for its workers. A terminal also sends SIGINT to each process of a command, and each prints a traceback.

So this module blocks SIGINT, and children inherit the blocked signal. One thread waits for SIGINT, ends all processes
below this one, and then the process itself. The handler of SIGTERM wakes that thread, too. All this works on
Linux, where Triton runs; elsewhere :func:`start` does nothing, and Python raises KeyboardInterrupt as usual.
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

STATUS = 130  # 128 + SIGINT, a shell's convention
PATIENCE_S = 1.0  # longest wait for a file that is being written, and again for children to end

_watch: _Watch | None = None
_writing = threading.RLock()


def start() -> None:
    """Handle SIGINT and SIGTERM until the process ends. Does nothing outside the main thread."""
    global _watch
    main = threading.current_thread() is threading.main_thread()
    if _watch is None and main and os.path.exists("/proc/self/stat"):
        _watch = _Watch()


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Handle SIGINT and SIGTERM within a ``with`` block, as :func:`start` does, and restore the old state after it."""
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
    """Call ``do`` as the last step if an interrupt comes within the block.

    ``do`` runs in the watching thread, while the main thread has stopped at an arbitrary point. So it must import
    nothing and take no lock; it may replace the process by another.
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
    """Make an interrupt wait, for at most a second, until the block has written its file."""
    with _writing:
        yield


@contextlib.contextmanager
def pool(workers: int, method: str) -> Iterator:
    """Yield an executor of ``workers`` processes; if the block raises, the processes are killed, not waited for.

    Args:
        workers: Number of processes.
        method: ``fork`` or ``spawn``, for :func:`multiprocessing.get_context`.
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
    """Start multiprocessing's resource tracker without its warnings about semaphores that killed workers leave."""
    from multiprocessing import resource_tracker

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    sys.warnoptions.append("ignore:resource_tracker")  # the tracker's process inherits the option
    resource_tracker.ensure_running()  # unblocks SIGINT, even if the caller has blocked it: the mask is restored below
    sys.warnoptions.pop()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Watch:
    """The thread that waits for SIGINT, and the signal state to restore."""

    def __init__(self):
        self.pid, self.ending, self.over = os.getpid(), False, False
        self.last: Callable[[], None] | None = None
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        # Threads that exist already do not block SIGINT: they need its handler. The handler also replaces SIG_IGN, with
        # which a shell starts background processes.
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
        if os.getpid() != self.pid:  # a forked child, which does not have the thread
            os._exit(STATUS)
        while self.ending:  # children are being killed: the main thread must not print their failures
            time.sleep(PATIENCE_S)
        signal.pthread_kill(self.thread.ident, signal.SIGINT)

    def _wait(self) -> None:
        signal.sigwait({signal.SIGINT})
        if self.over:
            return
        _writing.acquire(timeout=PATIENCE_S)
        self.ending = True
        _thread.interrupt_main()  # the handler above then stops the main thread
        _end_trees(pid for pid, (parent, _) in _processes().items() if parent == self.pid)
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
        if self.last is not None:
            # Some senders, such as timeout(1), send SIGINT twice: the second one must not reach ``last``.
            while signal.sigtimedwait({signal.SIGINT}, 0) is not None:
                pass
            self.last()
        os._exit(STATUS)  # sys.exit would wait for exit handlers and pools


def _end_trees(roots: Iterable[int]) -> None:
    """Kill the processes ``roots`` and all their descendants, and wait until they have ended.

    All are stopped first: otherwise a process that starts a child meanwhile would leave it behind as an orphan.
    """
    stopped: set[int] = set()
    found = {pid for pid in roots if not _tracks_resources(pid)}
    while found:
        for pid in found:
            _send(pid, signal.SIGSTOP)
        stopped |= found
        found = {pid for pid, (parent, _) in _processes().items() if parent in stopped} - stopped
    for pid in stopped:
        _send(pid, signal.SIGKILL)
    end = time.monotonic() + PATIENCE_S
    alive = stopped
    while alive and time.monotonic() < end:
        time.sleep(0.01)
        processes = _processes()
        alive = {pid for pid in alive if pid in processes and processes[pid][1] != "Z"}


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
    """Return whether ``pid`` is multiprocessing's resource tracker, which cleans up and ends after all others."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"multiprocessing.resource_tracker" in file.read()
    return False
