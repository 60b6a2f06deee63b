"""Compile the kernels without a GPU, read figures from the compiler's output, and check them against a contract."""

from vitkernels.tools.aot.build import TARGETS, Launch, Target, compile_launch, trace
from vitkernels.tools.aot.launches import launches
from vitkernels.tools.aot.read import Report, read_kernel

__all__ = ["TARGETS", "Launch", "Report", "Target", "compile_launch", "launches", "read_kernel", "trace"]
