"""The command ``vitkernels``. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vitkernels import __version__, _interrupt

OUTPUTS = ("out", "json", "junit", "html")  # options that name a file to write


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return 0, 1 if a check fails, 2 if the user must correct something.

    ``verify`` returns its own exit codes. Ctrl-C ends the process and all that it started, with status 130.
    """
    with _interrupt.answered():  # also while PyTorch is imported
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    from vitkernels.console import UserError, give_blas_one_thread, why_not_imported

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

    demo = commands.add_parser("demo", help="classify 450 handwritten digits, and draw what the model looks at")
    demo.add_argument("--out", type=Path, default=Path("vitkernels_demo.png"), help="the picture (%(default)s)")
    demo.set_defaults(run=_demo, runs_kernels=True, extra="demo")

    classify = commands.add_parser("classify", help="classify an image with a Vision Transformer of timm")
    classify.add_argument(
        "image", type=Path, metavar="IMAGE",
        help="PNG, JPEG or WebP; what is transparent shows white, or black around a subject that is nearly white",
    )  # fmt: skip
    classify.add_argument(
        "--model", required=True, metavar="NAME", help="timm's name, as vit_tiny_patch16_224, or the hub's"
    )
    classify.add_argument("--weights", type=Path, metavar="FILE", help="safetensors, or a state dict of torch.save")
    classify.add_argument("--out", type=Path, default=Path("vitkernels_classify.png"), help="the picture (%(default)s)")
    classify.set_defaults(run=_classify, runs_kernels=False, extra="demo,timm")

    explain = commands.add_parser("explain", help="say what accelerate() would make of a model, without its weights")
    explain.add_argument(
        "name", metavar="NAME", help="timm's name, as vit_tiny_patch16_224, the hub's, or a folder with a config.json"
    )
    explain.add_argument("--json", action="store_true", help="print JSON, not a table")
    explain.set_defaults(run=_explain, runs_kernels=False, extra="timm")

    verify = commands.add_parser(
        "verify", help="compare every op, and your model, with fp64 on this machine",
        description="Exit code: 0 passed, 1 numbers or behaviour are wrong, 2 this machine or the self-test is at "
        "fault, 3 nothing was verified.",
    )  # fmt: skip
    level = verify.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="what fits in a few minutes on a CPU (the default)")
    level.add_argument(
        "--full",
        action="store_true",
        help="every dtype and layout, ViTs' tokens and head dims, models by name, all targets",
    )
    verify.add_argument("--cpu", action="store_true", help="an emulated GPU and the compiler's report, no GPU")
    verify.add_argument(
        "--model", metavar="MODEL", help="this model as well, and the ops at its shapes: a name of timm, a "
        "folder with a config.json, or module:function, where the function returns the model, or it and its inputs",
    )  # fmt: skip
    verify.add_argument("--dtype", action="append", choices=("fp32", "fp16", "bf16"), help="may be given several times")
    verify.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    verify.add_argument("--only", action="append", metavar="PATTERN", help="only the checks whose id matches")
    for form in ("json", "junit", "html"):
        verify.add_argument(f"--{form}", type=Path, metavar="FILE", help=f"write the results as {form.upper()}")
    verify.set_defaults(run=_verify, runs_kernels=True, extra="triton")

    inspect = commands.add_parser("inspect", help="compile every kernel, without a GPU, and hold it to the contract")
    inspect.add_argument(
        "--target", action="append", choices=("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"), metavar="ARCH",
        help="sm_80, sm_90, sm_100, sm_120 or gfx942; may be given several times (sm_90)",
    )  # fmt: skip
    inspect.add_argument("--kernel", metavar="NAME", help="only kernels whose name holds NAME")
    inspect.add_argument("--case", action="append", metavar="NAME", help="only this case of vitkernels.testing.cases")
    inspect.add_argument("--all", action="store_true", help="a row for each launch, not for each kernel")
    inspect.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write all that was read")
    inspect.add_argument("--dump", type=Path, metavar="DIR", help="write TTGIR, PTX, cubin, SASS and the like")
    inspect.add_argument("--jobs", type=int, metavar="N", help="kernels compiled or run at a time (one a core)")
    inspect.add_argument(
        "--run", dest="count", action="store_true",
        help="run some programs of each on an emulated GPU, too: instructions by pipe, bytes, bank conflicts, and the "
        "least time they take (sm_80, sm_90, sm_120)",
    )  # fmt: skip
    inspect.add_argument("--update", action="store_true", help="take what is new or better into the contract")
    inspect.add_argument("--accept-worse", action="store_true", help="with --update: and what is worse, but no breach")
    inspect.add_argument(
        "--traffic", metavar="MODEL", help="count a block's passes over its activations instead, for a ViT of timm"
    )
    inspect.set_defaults(run=_inspect, runs_kernels=False, extra="triton")
    return parser


def _check_outputs(args: argparse.Namespace) -> None:
    """Raise UserError before the work starts if an output cannot be written, or would overwrite another file."""
    from vitkernels.console import UserError, check_can_write

    outputs = [path for path in (getattr(args, name, None) for name in OUTPUTS) if isinstance(path, Path)]
    inputs = [path for path in (getattr(args, name, None) for name in ("image", "weights")) if path is not None]
    for i, path in enumerate(outputs):
        check_can_write(path)
        for other in (*inputs, *outputs[:i]):
            if path.resolve() == other.resolve() and (path.is_file() or not path.exists()):
                raise UserError(f"cannot write {path}: it is given twice, and one would overwrite the other")


def _demo(args: argparse.Namespace) -> None:
    from vitkernels.demo.run import run_demo

    run_demo(args.out)


def _classify(args: argparse.Namespace) -> None:
    from vitkernels.demo.classify import classify

    classify(args.image, args.model, args.weights, args.out)


def _explain(args: argparse.Namespace) -> None:
    import torch

    from vitkernels import names, swap

    with torch.device("meta"):
        model, _ = names.build(args.name)
    report = swap.explain(model)
    if args.json:
        print(report.to_json())
    else:
        report.print()


def _verify(args: argparse.Namespace) -> int:
    import torch

    from vitkernels.console import UserError
    from vitkernels.verify import report
    from vitkernels.verify.run import Plan, verify

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
    from vitkernels.console import UserError, not_imported
    from vitkernels.ops import _triton

    if not _triton.HAS_TRITON:
        raise UserError(f"inspect compiles with Triton, which {not_imported(_triton.MISSING, 'triton')}")
    if args.accept_worse and not args.update:
        raise UserError("--accept-worse is for --update")
    if args.traffic is not None:
        return _traffic(args)
    from vitkernels.aot.inspect import inspect

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


def _traffic(args: argparse.Namespace) -> bool:
    from vitkernels.aot.traffic import run_traffic
    from vitkernels.console import UserError, one_line, write_file

    try:
        counted = run_traffic(args.traffic)
    except (RuntimeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    if args.json is not None:
        write_file(args.json, json.dumps(counted, indent=1) + "\n")
    return True


def _emulate_without_gpu(*, even_with: bool) -> None:
    """Select the emulator, here and in child processes, without a GPU or ``even_with`` one, unless a backend is set."""
    import torch

    gpu = torch.cuda.is_available() or torch.xpu.is_available()
    if even_with or not gpu:
        os.environ.setdefault("VITKERNELS_BACKEND", "emulated")
