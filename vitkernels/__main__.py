"""``python -m vitkernels`` and ``vitkernels``: the command line. Ctrl-C is handled before the heavy imports."""

import sys

from vitkernels.tools import _interrupt


def main() -> int:
    """Run this process's command line and return its exit status."""
    _interrupt.start()
    from vitkernels.tools import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
