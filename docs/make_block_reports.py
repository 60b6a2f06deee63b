"""Write a block's passes over memory, launches and estimated times into docs/compiler-report.md, in four minutes.

python docs/make_block_reports.py
"""

from __future__ import annotations

import contextlib
import datetime
import io
import re
from pathlib import Path

import torch
import triton

from vitkernels.tools.aot import block_launches, block_time
from vitkernels.tools.aot.traffic import PROVIDERS, run_traffic
from vitkernels.tools.tables import Table, markdown_table

PAGE = Path(__file__).with_name("compiler-report.md")
PASSES = {
    "ViT-B/16, a block": "vit_base_patch16_224",
    "DeiT-III-B/16, a block with LayerScale": "deit3_base_patch16_224",
    "Swin-T, first stage": "swin_tiny_patch4_window7_224",
    "Swin-B, first stage": "swin_base_patch4_window7_224",
    "Swin V2-B, first stage": "swinv2_base_window8_256",
}


def filled(page: str, name: str, text: str) -> str:
    """Return ``page`` with ``text`` between the marks of ``name``."""
    marks = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    return re.sub(f"{marks[0]}.*?{marks[1]}", lambda _: f"{marks[0]}{text}\n{marks[1]}", page, flags=re.S)


def passes() -> str:
    """Return the passes over memory beyond what products and attention need."""
    rows = []
    for title, model in PASSES.items():
        with contextlib.redirect_stdout(io.StringIO()):
            counted = run_traffic(model)
        for kind, found in counted.items():
            extra = [f"{found[name]['extra']:.1f}" if name in found else "not counted" for name in reversed(PROVIDERS)]
            rows.append([title, kind, *extra])
    return markdown_table(Table(["", "", "accelerated", "timm by `torch.compile`", "timm"], rows, words=2))


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
    page = filled(filled(filled(page, "passes", passes()), "launches", launches), "times", times)
    PAGE.write_text(page, encoding="utf-8")
