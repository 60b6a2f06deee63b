"""Reports of a verification: at the terminal, as JSON, as JUnit XML and as one HTML page.

The JSON is :meth:`Verification.to_dict`. Its keys are stable; later versions may add keys. ``status`` is ``passed``,
``failed``, ``skipped`` or ``broken``. ``ratio`` is our error divided by PyTorch's, null if not measured or not finite::

    {
      "verdict": "failed: numbers or behaviour are wrong",
      "exit_code": 1,
      "command": "vitkernels verify --quick --cpu",
      "seconds": 41.7,
      "environment": {"vitkernels": "0.2.0", "torch": "2.13.0", "device": "CPU, emulated H100"},
      "results": [
        {
          "check": "accuracy/mlp/10 tokens of 40 channels/fp32",
          "name": "dw1",
          "status": "failed",
          "detail": "max error 0.0148 at (3, 17), limit 2.1e-06 (PyTorch's 7.2e-07)",
          "ratio": 20556.1,
          "dtype": "fp32",
          "seconds": 0.021
        }
      ]
    }
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from vitkernels.tools.console import write_file
from vitkernels.tools.verify.report.junit import to_junit
from vitkernels.tools.verify.report.page import to_html
from vitkernels.tools.verify.report.terminal import print_report
from vitkernels.tools.verify.results import Verification

__all__ = ["print_report", "to_html", "to_json", "to_junit", "write_html", "write_json", "write_junit"]


def to_json(verification: Verification) -> str:
    """Return the verification as JSON, in the form that this module documents."""
    data = verification.to_dict()
    for result in data["results"]:
        if result["ratio"] is not None and not math.isfinite(result["ratio"]):  # JSON cannot represent it
            result["ratio"] = None
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(verification: Verification, path: Path) -> None:
    """Write :func:`to_json` to ``path``.

    Raises:
        UserError: The folder does not exist, or the file cannot be written; an older file is then unchanged.
    """
    write_file(path, to_json(verification))


def write_junit(verification: Verification, path: Path) -> None:
    """Write :func:`to_junit` to ``path``; raises as :func:`write_json` does."""
    write_file(path, to_junit(verification))


def write_html(verification: Verification, path: Path) -> None:
    """Write :func:`to_html` to ``path``; raises as :func:`write_json` does."""
    write_file(path, to_html(verification))
