"""The two ways in which a command ends badly, and how a command line reports them."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user's: one line that says what, where and what to do. Exit code 2."""


class RunError(Exception):
    """A run that started well and failed, for example by a non-finite loss. Exit code 1."""


def exit_code_of(command: Callable[[], None]) -> int:
    """Run a command; print a known error as one line on stderr. Returns the exit code (130 for Ctrl-C)."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0
