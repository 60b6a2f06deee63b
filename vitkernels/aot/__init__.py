"""Compile the kernels for a GPU that is not there, read what came out, and hold it to a contract."""

from vitkernels.aot.build import TARGETS, Launch, Target, compile_launch, trace
from vitkernels.aot.launches import launches
from vitkernels.aot.read import Report, read_kernel

__all__ = ["TARGETS", "Launch", "Report", "Target", "compile_launch", "launches", "read_kernel", "trace"]
