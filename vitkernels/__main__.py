"""``python -m vitkernels`` and ``vitkernels``: the command line, with Ctrl-C answered before anything is imported."""

import sys

from vitkernels import _interrupt


def main() -> int:
    """Run the process's command line; return its exit status."""
    _interrupt.start()
    from vitkernels import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
