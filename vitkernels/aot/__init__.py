"""Compile the kernels for a GPU that is not there, and read what came out."""

from vitkernels.aot.build import TARGETS, Report, Target, compile_launches
from vitkernels.aot.launches import launches

__all__ = ["TARGETS", "Report", "Target", "compile_launches", "launches"]
