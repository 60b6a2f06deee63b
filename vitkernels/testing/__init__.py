"""What tests and tools share: real cases by name, and the rule by which an error is judged."""

from vitkernels.testing.compare import Verdict, check, check_op, judge_op

__all__ = ["Verdict", "check", "check_op", "judge_op"]
