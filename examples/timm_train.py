"""Run timm's own train.py on the kernels: every model that it makes is accelerated, and nothing else changes.

    git clone https://github.com/huggingface/pytorch-image-models
    python examples/timm_train.py pytorch-image-models/train.py --model vit_base_patch16_224 --data-dir ...
    torchrun --nproc-per-node 8 examples/timm_train.py pytorch-image-models/train.py --amp --model ...

It is for any script that makes its models with timm.create_model: validate.py and inference.py, too. Arguments behind
the script are the script's own. timm's script lies beside no package, so it comes from timm's repository; take the tag
of the version that is installed.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from collections.abc import Callable

from torch import nn

import vitkernels
from vitkernels.tools.console import UserError, import_timm


def accelerating(create_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap ``timm.create_model`` so that it returns accelerated models; the first process prints the reports."""

    @functools.wraps(create_model)
    def create(*args, **kwargs) -> nn.Module:
        model = create_model(*args, **kwargs)
        report = vitkernels.accelerate(model)
        if os.environ.get("RANK", "0") == "0":  # set by torchrun
            report.print()
        return model

    return create


def main(argv: list[str] | None = None) -> None:
    """Run the script that the command line names, with the rest of it."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        sys.exit(__doc__)
    if not os.path.isfile(argv[0]):
        sys.exit(f"timm_train: there is no script {argv[0]}")
    try:
        timm = import_timm()
    except UserError as error:
        sys.exit(f"timm_train: {error}")
    # Scripts import it from either place.
    timm.create_model = timm.models.create_model = accelerating(timm.models.create_model)
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))  # as Python does for a script
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
