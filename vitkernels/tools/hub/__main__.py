"""``python -m vitkernels.tools.hub``: the command line."""

import argparse
import re
import sys
from pathlib import Path

from vitkernels.tools.console import UserError
from vitkernels.tools.hub import NAME, build


def repository(text: str) -> str:
    """Read the name of a repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no OWNER/NAME")
    return text


def main(argv: list[str] | None = None) -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(
        prog=f"{NAME}.tools.hub", description="Write this library as a repository of Hugging Face's kernels hub."
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the repository")
    parser.add_argument(
        "--repo-id", type=repository, default=f"{NAME}/{NAME}", metavar="OWNER/NAME", help="its name (%(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        build(args.out, args.repo_id)
    except UserError as error:
        sys.exit(f"hub: {error}")
    print(f"hub: wrote {args.repo_id} to {args.out}")


if __name__ == "__main__":
    main()
