"""The `edgert` command, also `python -m edgert`."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line. Ctrl-C while it is still being imported ends as quietly as later."""
    try:
        from edgert.cli.main import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
