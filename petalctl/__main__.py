"""``python -m petalctl``, and the console script."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line; gives the exit status."""
    from petalctl.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
