"""Write the launches and the estimated times of a block into docs/compiler-report.md. It takes two minutes.

python docs/make_block_reports.py
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import torch
import triton

from vitkernels.tools.aot import block_launches, block_time
from vitkernels.tools.tables import Table, markdown_table

PAGE = Path(__file__).with_name("compiler-report.md")


def filled(page: str, name: str, text: str) -> str:
    """Return ``page`` with ``text`` between the marks of ``name``."""
    marks = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    return re.sub(f"{marks[0]}.*?{marks[1]}", lambda _: f"{marks[0]}{text}\n{marks[1]}", page, flags=re.S)


def tables() -> tuple[str, str]:
    """Return the launches and the estimated times of the models that the contract holds."""
    made = f"{datetime.date.today()}, torch {torch.__version__}, Triton {triton.__version__}"
    launches, times = [], []
    for model, known in block_launches.load().items():
        title = f"{model}, batch {known['batch']} ({made}):\n"
        counted = block_launches.count_launches(model, known["batch"])
        launches += [title, markdown_table(Table(*block_launches.summary(counted, known["goals"]), words=2)), ""]
        estimates = block_time.estimate_blocks(model, known["batch"])
        times += [f"Estimated µs, {title}", markdown_table(Table(*block_time.summary(estimates), words=2)), ""]
    return "\n".join(launches).strip(), "\n".join(times).strip()


if __name__ == "__main__":
    launches, times = tables()
    page = PAGE.read_text(encoding="utf-8")
    page = filled(filled(page, "launches", launches), "times", times)
    PAGE.write_text(page, encoding="utf-8")
