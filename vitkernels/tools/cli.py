"""The command ``vitkernels``. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vitkernels import __version__
from vitkernels.tools import _interrupt

OUTPUTS = ("out", "json", "junit", "html")  # options that name a file to write


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return 0, 1 if a check fails, 2 if the user must correct something.

    ``verify`` returns its own exit codes. Ctrl-C ends the process and all that it started, with status 130.
    """
    with _interrupt.answered():  # also while PyTorch is imported
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    from vitkernels.tools.console import UserError, give_blas_one_thread, why_not_imported

    if args.runs_kernels:
        if args.run is _verify:  # its workers would each start a BLAS thread per core
            give_blas_one_thread()
        _emulate_without_gpu(even_with=getattr(args, "cpu", False))
    try:
        _check_outputs(args)
        outcome = args.run(args)
    except ImportError as error:
        print(f"vitkernels: {why_not_imported(args.command, error, args.extra)}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"vitkernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if outcome is None else 1 - outcome if isinstance(outcome, bool) else outcome


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitkernels", description="Triton kernels for Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"vitkernels {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    def command(name: str, help: str, more: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.{more}")

    demo = command("demo", "classify 450 handwritten digits and draw where the model attends")
    demo.add_argument(
        "--out", type=Path, default=Path("vitkernels_demo.png"), help="write the picture to OUT (%(default)s)"
    )
    demo.set_defaults(run=_demo, runs_kernels=True, extra="demo")

    classify = command("classify", "classify an image with a Vision Transformer from timm")
    classify.add_argument(
        "image", type=Path, metavar="IMAGE",
        help="PNG, JPEG or WebP file; its transparent parts become white, or black behind a nearly white subject",
    )  # fmt: skip
    classify.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a model of timm by name, such as vit_tiny_patch16_224, or a name on the Hugging Face hub",
    )
    classify.add_argument(
        "--weights", type=Path, metavar="FILE",
        help="load weights from safetensors or from a state dict of torch.save (timm's pretrained weights)",
    )  # fmt: skip
    classify.add_argument(
        "--out", type=Path, default=Path("vitkernels_classify.png"), help="write the picture to OUT (%(default)s)"
    )
    classify.set_defaults(run=_classify, runs_kernels=False, extra="demo,timm")

    explain = command("explain", "show what accelerate() would swap in a model, without loading weights")
    explain.add_argument(
        "name", metavar="NAME",
        help="a model of timm by name, such as vit_tiny_patch16_224; a name on the Hugging Face hub; or a folder with "
        "a config.json",
    )  # fmt: skip
    explain.add_argument("--json", action="store_true", help="print JSON instead of a table")
    explain.set_defaults(run=_explain, runs_kernels=False, extra="timm")

    verify = command(
        "verify", "check every op, and your model, against an fp64 reference on this machine",
        " Exit code: 0 all checks passed; 1 numbers or behaviour are wrong; 2 a check could not run, or the self-test "
        "let a seeded defect through; 3 nothing was verified.",
    )  # fmt: skip
    level = verify.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="run what takes a few minutes on a CPU (the default)")
    level.add_argument(
        "--full", action="store_true",
        help="run every dtype and layout, more token counts and head dims, models by name, and all targets",
    )  # fmt: skip
    verify.add_argument(
        "--cpu", action="store_true", help="use an emulated GPU and the compiler's report, even where there is a GPU"
    )
    verify.add_argument(
        "--model", metavar="MODEL", help="also check this model, and the ops at its shapes: a name of timm, a "
        "folder with a config.json, or module:function, where the function returns the model, or it and its inputs",
    )  # fmt: skip
    verify.add_argument(
        "--dtype", action="append", choices=("fp32", "fp16", "bf16"), help="check only this dtype; may be repeated"
    )
    verify.add_argument("--seed", type=int, default=0, help="seed of all random numbers (%(default)s)")
    verify.add_argument(
        "--only", action="append", metavar="PATTERN", help="run only checks whose id matches PATTERN; may be repeated"
    )
    for form, name in {"json": "JSON", "junit": "JUnit XML", "html": "HTML"}.items():
        verify.add_argument(f"--{form}", type=Path, metavar="FILE", help=f"write the results as {name}")
    verify.set_defaults(run=_verify, runs_kernels=True, extra="triton")

    inspect = command("inspect", "compile every kernel without a GPU and check it against the contract")
    inspect.add_argument(
        "--target", action="append", choices=("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"), metavar="ARCH",
        help="compile for sm_80, sm_90, sm_100, sm_120 or gfx942; may be repeated (sm_90)",
    )  # fmt: skip
    inspect.add_argument("--kernel", metavar="NAME", help="inspect only kernels whose name contains NAME")
    inspect.add_argument(
        "--case",
        action="append",
        metavar="NAME",
        help="use only this case of vitkernels.testing.cases; may be repeated",
    )
    inspect.add_argument("--all", action="store_true", help="print one row per launch instead of one per kernel")
    inspect.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    inspect.add_argument("--dump", type=Path, metavar="DIR", help="write TTGIR, PTX, cubin, SASS and the like to DIR")
    inspect.add_argument("--jobs", type=int, metavar="N", help="compile or run N kernels at a time (one per core)")
    inspect.add_argument(
        "--run", dest="count", action="store_true",
        help="also run some programs of each kernel on an emulated GPU: count instructions by pipe, bytes and bank "
        "conflicts, and derive a lower bound of the time (sm_80, sm_90, sm_120)",
    )  # fmt: skip
    inspect.add_argument("--update", action="store_true", help="write new and better figures into the contract")
    inspect.add_argument(
        "--accept-worse", action="store_true", help="with --update: write worse figures, too, unless they break a rule"
    )
    inspect.add_argument(
        "--traffic", metavar="MODEL",
        help="count, instead, how often a block of MODEL, a ViT or Swin of timm, reads or writes its activations",
    )  # fmt: skip
    inspect.add_argument(
        "--launches", metavar="MODEL",
        help="count, instead, what one block of MODEL, a ViT of timm, launches, and hold it to the contract",
    )  # fmt: skip
    inspect.add_argument(
        "--time", metavar="MODEL",
        help="estimate, instead, how long an A100, H100, H200 and B200 take for one block of MODEL, a ViT of timm",
    )  # fmt: skip
    inspect.add_argument(
        "--batch", type=int, metavar="N", help="with --launches or --time: number of images (256, or the contract's)"
    )
    inspect.add_argument(
        "--gpu", action="append", choices=("A100", "H100", "H200", "B200"),
        help="with --time: print the launches on this GPU one by one; may be repeated (H100)",
    )  # fmt: skip
    inspect.set_defaults(run=_inspect, runs_kernels=False, extra="triton")
    return parser


def _check_outputs(args: argparse.Namespace) -> None:
    """Raise UserError before the work starts if an output cannot be written, or would overwrite another file."""
    from vitkernels.tools.console import UserError, check_can_write

    outputs = [path for path in (getattr(args, name, None) for name in OUTPUTS) if isinstance(path, Path)]
    inputs = [path for path in (getattr(args, name, None) for name in ("image", "weights")) if path is not None]
    for i, path in enumerate(outputs):
        check_can_write(path)
        for other in (*inputs, *outputs[:i]):
            if path.resolve() == other.resolve() and (path.is_file() or not path.exists()):
                raise UserError(f"cannot write {path}: it is given twice, and one would overwrite the other")


def _demo(args: argparse.Namespace) -> None:
    from vitkernels.tools.demo.run import run_demo

    run_demo(args.out)


def _classify(args: argparse.Namespace) -> None:
    from vitkernels.tools.demo.classify import classify

    classify(args.image, args.model, args.weights, args.out)


def _explain(args: argparse.Namespace) -> None:
    import torch

    from vitkernels import swap
    from vitkernels.tools import names

    with torch.device("meta"):
        model, _ = names.build(args.name)
    report = swap.explain(model)
    if args.json:
        print(report.to_json())
    else:
        report.print()


def _verify(args: argparse.Namespace) -> int:
    import torch

    from vitkernels.tools.console import UserError
    from vitkernels.tools.verify import report
    from vitkernels.tools.verify.run import Plan, verify

    paths = {form: getattr(args, form) for form in ("json", "junit", "html") if getattr(args, form) is not None}
    gpu = torch.cuda.is_available()
    if torch.xpu.is_available() and not gpu and not args.cpu:
        raise UserError("verify knows CUDA and ROCm, no XPU yet; --cpu checks the kernels on an emulated GPU")
    device = torch.device("cuda" if gpu and not args.cpu else "cpu")
    plan = Plan(
        full=args.full,
        device=device,
        dtypes=tuple(args.dtype or ()),
        seed=args.seed,
        model=args.model,
        only=tuple(args.only or ()),
    )
    words = ["vitkernels", "verify", "--full" if args.full else "--quick"] + ["--cpu"] * (device.type == "cpu")
    words += ["--model", args.model] if args.model else []
    words += [word for name in plan.dtypes for word in ("--dtype", name)]
    words += ["--seed", str(args.seed)] if args.seed else []
    verification = verify(plan, shlex.join(words))
    report.print_report(verification)
    for form, path in paths.items():
        getattr(report, f"write_{form}")(verification, path)
    return verification.exit_code


def _inspect(args: argparse.Namespace) -> bool:
    from vitkernels.ops import _triton
    from vitkernels.tools.console import UserError, not_imported

    if not _triton.HAS_TRITON:
        raise UserError(f"inspect compiles with Triton, which {not_imported(_triton.MISSING, 'triton')}")
    if args.accept_worse and not args.update:
        raise UserError("--accept-worse is for --update")
    reports = {"traffic": _traffic, "launches": _launches, "time": _time}
    asked = [name for name in reports if getattr(args, name) is not None]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two reports: ask for one at a time")
    if args.batch is not None and asked not in (["launches"], ["time"]):
        raise UserError("--batch is for --launches and --time")
    if args.gpu and asked != ["time"]:
        raise UserError("--gpu is for --time")
    if args.update and asked in (["traffic"], ["time"]):
        raise UserError(f"--update is not for --{asked[0]}, which no contract holds")
    if asked:
        return _of_block(args, reports[asked[0]])
    from vitkernels.tools.aot.inspect import inspect

    return inspect(
        list(dict.fromkeys(args.target or ["sm_90"])),
        kernel=args.kernel,
        cases=args.case,
        every=args.all,
        markdown=args.markdown,
        json_file=args.json,
        dump=args.dump,
        jobs=args.jobs,
        run=args.count,
        update=args.update,
        accept_worse=args.accept_worse,
    )


def _of_block(args: argparse.Namespace, report: Callable[[argparse.Namespace], tuple[bool, dict]]) -> bool:
    """Print a report on one block of a model, write its JSON, and return whether the contract holds."""
    from vitkernels.tools.console import UserError, one_line, write_file

    try:
        holds, found = report(args)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(one_line(error)) from error
    if args.json is not None:
        write_file(args.json, json.dumps(found, indent=1) + "\n")
    return holds


def _traffic(args: argparse.Namespace) -> tuple[bool, dict]:
    from vitkernels.tools.aot.traffic import run_traffic

    return True, run_traffic(args.traffic)


def _launches(args: argparse.Namespace) -> tuple[bool, dict]:
    from vitkernels.tools.aot.block_launches import run_launches

    return run_launches(args.launches, batch=args.batch, update_contract=args.update, accept_worse=args.accept_worse)


def _time(args: argparse.Namespace) -> tuple[bool, dict]:
    from vitkernels.tools.aot.block_time import BATCH, run_time

    batch = BATCH if args.batch is None else args.batch
    return True, run_time(args.time, batch=batch, shown=list(dict.fromkeys(args.gpu or ["H100"])))


def _emulate_without_gpu(*, even_with: bool) -> None:
    """Select the emulator, here and in child processes, without a GPU or ``even_with`` one, unless a backend is set."""
    import torch

    gpu = torch.cuda.is_available() or torch.xpu.is_available()
    if even_with or not gpu:
        os.environ.setdefault("VITKERNELS_BACKEND", "emulated")
