"""The console script `bqnn`: a module beside the package, as importing anything in that imports PyTorch.

Whoever presses Ctrl-C in these seconds gets what they get later, and no traceback.
"""

from __future__ import annotations

import sys


def interrupted() -> int:
    """Says so, and returns the exit status: what a shell reports for Ctrl-C."""
    print("bqnn: interrupted", file=sys.stderr)
    return 130


def main() -> int:
    """Runs the command with the arguments of the process and returns its exit status."""
    try:
        from bqnn.cli.main import main as command

        return command()
    except KeyboardInterrupt:
        return interrupted()
