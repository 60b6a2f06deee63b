"""The command line: ``python -m benchmarks [report | everything | tune | page]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vitkernels.tools import _interrupt

RESERVED = 0.1  # share of the budget that is kept for writing the report
RESERVED_S = 12.0  # and at most so many seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return 0, 1 for a regression or a wrong result, 2 for an error of the user.

    ``page --check`` returns 1 if the page is out of date.
    """
    with _interrupt.answered():
        from vitkernels.tools.console import UserError, why_not_imported

        args = _parser().parse_args(argv)
        try:
            return args.run(args)
        except ImportError as error:
            print(f"benchmarks: {why_not_imported('a benchmark', error, 'bench')}", file=sys.stderr)
            return 2
        except (UserError, ValueError, OSError) as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure speed, memory and errors.")
    _add_run(parser, budget=None)
    parser.add_argument(
        "--suite", choices=("ops", "models", "quick", "all"), default="quick", help="what to measure (%(default)s)"
    )
    parser.set_defaults(run=_run)
    commands = parser.add_subparsers(metavar="COMMAND")

    report = commands.add_parser(
        "report", help="write the report of a run, or compare two: exit status 1 if B is worse than A"
    )
    report.add_argument("a", type=Path, metavar="A.json")
    report.add_argument("b", type=Path, metavar="B.json", nargs="?")
    report.add_argument("--out", type=Path, metavar="DIR", help="write the report to DIR (the folder of the last file)")
    report.add_argument("--interrupted", action="store_true", help=argparse.SUPPRESS)
    report.set_defaults(run=_report)

    everything = commands.add_parser("everything", help="check every op on this device, then tune, then measure")
    _add_run(everything, budget=540.0)
    everything.set_defaults(run=_everything)

    tune = commands.add_parser("tune", help="search launch configurations on this GPU and write its tuning table")
    tune.add_argument("--budget", type=_seconds, default=300.0, metavar="SECONDS", help="time limit (%(default)g)")
    tune.set_defaults(run=_tune)

    page = commands.add_parser(
        "page", help="write the results in docs/benchmarks.md from the newest run of each device"
    )
    page.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is out of date")
    page.set_defaults(run=_page)
    return parser


def _add_run(parser: argparse.ArgumentParser, budget: float | None) -> None:
    said = "300 for quick, else 3600" if budget is None else "%(default)g"
    parser.add_argument(
        "--budget", type=_seconds, default=budget, metavar="SECONDS", help=f"time limit of the whole run ({said})"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmark_results"),
        metavar="DIR",
        help="write JSON, Markdown, HTML and PNG files to DIR (%(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="also keep the JSON in benchmarks/results")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive number of seconds")
    return seconds


def _run(args: argparse.Namespace) -> int:
    from benchmarks.suites import run_suite

    seconds = args.budget or (300.0 if args.suite == "quick" else 3600.0)
    return _measure(args, seconds, lambda device, budget, path: run_suite(args.suite, device, budget, path))


def _everything(args: argparse.Namespace) -> int:
    from benchmarks.everything import run_everything

    args.keep = True
    return _measure(args, args.budget, run_everything)


def _measure(args: argparse.Namespace, seconds: float, measure) -> int:
    from benchmarks.run import Budget

    budget = Budget(seconds, reserve=min(RESERVED_S, RESERVED * seconds))
    import benchmarks.plots  # noqa: F401  if matplotlib is missing, fail before the time is spent
    from benchmarks.environment import ROOT, find_device
    from benchmarks.schema import load
    from vitkernels.tools.console import check_can_fill, check_can_write

    for folder in (args.out, ROOT / "benchmarks" / "results")[: 1 + args.keep]:
        check_can_fill(folder)
    path = (args.out / "results.json").absolute()
    check_can_write(path)
    path.unlink(missing_ok=True)

    def report_instead() -> None:
        # Replace this process: an import may have been interrupted halfway, and its modules are unusable.
        if path.exists():
            os.write(2, b"\nInterrupted: writing the report of what was measured. Ctrl-C ends without it.\n")
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks", "report", str(path), "--interrupted"])

    with _interrupt.at_the_end(report_instead):
        measure(find_device(), budget, path)
    results = load(path)
    _write(results, args.out)
    if args.keep:
        print(f"Kept as {_keep(path)}")
    print(f"{budget.spent():.0f} s of {seconds:.0f} s.")
    return int(_say_what_is_wrong(results))


def _say_what_is_wrong(results) -> bool:
    wrong = [row for row in results.rows if row.ours and row.status in ("wrong", "failed")]
    for row in wrong:
        print(f"{row.status}: {' '.join(map(str, row.key))}: {row.reason}", file=sys.stderr)
    return bool(wrong)


def _write(results, out: Path, before=None) -> None:
    from benchmarks.report import write_report

    files = write_report(results, out, before=before)
    print("Written: " + ", ".join(str(file) for file in files if file.suffix != ".png"))


def _keep(path: Path) -> Path:
    """Store the run in place of the device's last one, and return its file."""
    from benchmarks.environment import ROOT, folder_name
    from benchmarks.schema import load, save

    results = load(path)
    results.rows = [row for row in results.rows if row.status != "counted"]  # counts are the same on every machine
    name = f"{results.date[:10]}-{results.commit or 'unknown'}.json"
    kept = ROOT / "benchmarks" / "results" / folder_name(results) / name
    save(results, kept)
    for older in set(kept.parent.glob("*.json")) - {kept}:
        older.unlink()
    return kept


def _report(args: argparse.Namespace) -> int:
    from benchmarks.report import changed, comparison, to_markdown
    from benchmarks.schema import load
    from vitkernels.tools.console import check_can_fill

    before = load(args.a) if args.b else None
    results = load(args.b or args.a)
    out = args.out or (args.b or args.a).parent
    check_can_fill(out)
    _write(results, out, before)
    if args.interrupted:
        _say_what_is_wrong(results)
        return _interrupt.STATUS
    if before is None:
        return 0
    print(to_markdown(f"{args.a} and {args.b}", list(comparison(before, results))))
    return int(any(change.worse for change in changed(before, results)))


def _tune(args: argparse.Namespace) -> int:
    from benchmarks.run import Budget

    budget = Budget(args.budget)
    from benchmarks.environment import find_device
    from benchmarks.tune import tune

    print(f"Written: {tune(find_device(), budget)}")
    return 0


def _page(args: argparse.Namespace) -> int:
    from benchmarks.page import update

    stale = update(write=not args.check)
    if args.check and stale:
        print("The results in docs/benchmarks.md are out of date: run python -m benchmarks page", file=sys.stderr)
    return int(args.check and stale)


if __name__ == "__main__":
    _interrupt.start()
    sys.exit(main())
