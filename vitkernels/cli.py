"""The command ``vitkernels``. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vitkernels import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return 0, or 2 where the user has something to put right."""
    args = _parser().parse_args(argv)
    _turn_interpreter_on_without_gpu()
    from vitkernels.demo.console import UserError

    try:
        args.run(args)
    except UserError as error:
        print(f"vitkernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitkernels", description="Triton kernels for Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"vitkernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="classify 450 handwritten digits, and draw what the model looks at")
    demo.add_argument("--out", type=Path, default=Path("vitkernels_demo.png"), help="the picture (%(default)s)")
    demo.set_defaults(run=_demo)

    classify = commands.add_parser("classify", help="classify an image with a Vision Transformer of timm")
    classify.add_argument("image", type=Path, metavar="IMAGE", help="PNG, JPEG or WebP")
    classify.add_argument("--model", required=True, metavar="NAME", help="timm's name, as vit_tiny_patch16_224")
    classify.add_argument("--weights", type=Path, metavar="FILE", help="safetensors, or a state dict of torch.save")
    classify.add_argument("--out", type=Path, default=Path("vitkernels_classify.png"), help="the picture (%(default)s)")
    classify.set_defaults(run=_classify)
    return parser


def _demo(args: argparse.Namespace) -> None:
    from vitkernels.demo.run import run_demo

    run_demo(args.out)


def _classify(args: argparse.Namespace) -> None:
    from vitkernels.demo.classify import classify

    classify(args.image, args.model, args.weights, args.out)


def _turn_interpreter_on_without_gpu() -> None:
    """Let the kernels run on a CPU: fixed when they are decorated, so this must come before Triton is imported."""
    import torch

    gpu = torch.cuda.is_available() or torch.xpu.is_available()
    if not gpu and importlib.util.find_spec("triton") is not None:
        os.environ.setdefault("TRITON_INTERPRET", "1")
