"""Compile the engine with the machine's C++ compiler at first use, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from vitkernels.emulator.lists import ENGINE

# Contraction would fuse a multiplication and an addition, and round once instead of twice. Strict aliasing would
# miscompile the registers, which the engine reads as 32-bit and 64-bit integers and floats in turn.
FLAGS = [
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fwrapv", "-fno-strict-aliasing"),
    *("-shared", "-fPIC"),
]
# Tried in this order until the compiler accepts one; the engine is correct without them, but slower.
FASTER = [["-march=native", "-mprefer-vector-width=512"], ["-march=native"], ["-mcpu=native"], []]


class NoCompiler(RuntimeError):
    """No C++ compiler was found, or it failed."""


def compilers() -> list[list[str]]:
    """Return the commands that may compile C++, the preferred one first."""
    named = os.environ.get("CXX", "").split()
    found = [named] if named else []
    found += [[path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]
    if importlib.util.find_spec("ziglang"):
        found.append([sys.executable, "-m", "ziglang", "c++"])
    return found


def cache_directory() -> Path:
    """Return the engines' cache folder: $VITKERNELS_CACHE, $XDG_CACHE_HOME/vitkernels or ~/.cache/vitkernels."""
    if own := os.environ.get("VITKERNELS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitkernels"


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


def _processor() -> str:
    """Return what ``-march=native`` depends on: different machines may share one cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def build() -> Path:
    """Return the engine's shared library; compile it unless the cache has it for this compiler and machine.

    Raises:
        NoCompiler: No C++ compiler was found, or it failed.
    """
    sources = sorted(ENGINE.glob("*.h")) + sorted(ENGINE.glob("*.cpp"))
    failures = []
    for compiler in compilers():
        try:
            version = _run([*compiler, "--version"])
        except OSError as error:
            failures.append(f"{' '.join(compiler)}: {error}")
            continue
        key = hashlib.sha256()
        for part in (*(s.read_bytes() for s in sources), repr((compiler, version.stdout, FLAGS, FASTER)).encode()):
            key.update(hashlib.sha256(part).digest())
        key.update(f"{platform.machine()} {sys.platform} {_processor()}".encode())
        target = cache_directory() / f"emulator-{key.hexdigest()[:20]}.so"
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        for faster in FASTER:
            # Another process may compile the same engine now: a rename within one directory is atomic.
            handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
            os.close(handle)
            done = _run([*compiler, *FLAGS, *faster, "-o", name, str(ENGINE / "engine.cpp")])
            if done.returncode == 0:
                os.chmod(name, 0o755)
                os.replace(name, target)
                return target
            os.unlink(name)
        failures.append(f"{' '.join(compiler)}: {done.stderr.strip()[-2000:]}")
    raise NoCompiler(
        "the emulator's engine is C++17 and is compiled at first use, for which a compiler is needed: install one "
        "(Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; without an administrator: pip install "
        "ziglang), or name one in the environment variable CXX" + "".join(f"\n{f}" for f in failures)
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Load the engine. Its calls release the GIL; only one thread at a time may use a machine."""
    lib = ctypes.CDLL(str(build()))
    pointer, i32, u32, i64, u64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64
    for name, result, *arguments in (
        ("emu_address", u64, i32, u64),
        ("emu_locate", i32, u64, pointer),
        ("emu_new", pointer, pointer, i32, pointer, pointer, pointer, i32, i32, i32, u32, i32, i32),
        ("emu_params", None, pointer, pointer, i32),
        ("emu_buffer", None, pointer, pointer, u64, i32, u64, u64),
        ("emu_run", i64, pointer, pointer, i32, pointer, i32, u64, u64),
        ("emu_error", ctypes.c_char_p, pointer),
        ("emu_error_pc", i32, pointer),
        ("emu_total", u64, pointer),
        ("emu_found", None, pointer, pointer),
        ("emu_counts", None, pointer, pointer),
        ("emu_touched", None, pointer, i32, pointer),
        ("emu_sectors", pointer, pointer, i32),
        ("emu_granules", pointer, pointer, i32, i32),
        ("emu_free", None, pointer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
