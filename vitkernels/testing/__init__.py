"""Shared by tests and tools: the shapes of real models by name, and the rule that judges errors."""

from vitkernels.testing.compare import Verdict, check, check_op, judge_op

__all__ = ["Verdict", "check", "check_op", "judge_op"]
