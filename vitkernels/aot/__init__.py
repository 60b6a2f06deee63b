"""Compile the kernels for a GPU that is not there, and read what came out."""

from vitkernels.aot.build import TARGETS, Report, Target, compile_launches

__all__ = ["TARGETS", "Report", "Target", "compile_launches"]
