"""The ``petald`` command."""

from __future__ import annotations

import sys

from petald.config import parse_arguments
from petald.errors import PetaldError

EXIT_FAILED = 1
EXIT_USAGE = 2


def main() -> int:
    """Runs the daemon as the command line and the configuration file say; gives the exit status."""
    try:
        config = parse_arguments(sys.argv[1:])
    except PetaldError as error:
        print(f"petald: {error}", file=sys.stderr)
        return EXIT_USAGE
    # torch and libp2p take seconds to import; whoever asks for --help should not wait for them.
    from petald.start import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main())
