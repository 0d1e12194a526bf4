"""The two ways in which a command ends badly, and how a command line reports them."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from dlops_dist import __version__


class UserError(Exception):
    """A mistake of the user's: one line that says what, where and what to do. Exit code 2."""


class RunError(Exception):
    """A run that started well and failed, for example by a non-finite loss. Exit code 1."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser as all commands have it: errors in one line, --version, help in colour on a terminal."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.add_argument("--version", action="version", version=f"dlops_dist {__version__}", help="print it and exit")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")

    def print_help(self, file: Any = None) -> None:
        if not sys.stdout.isatty():
            super().print_help(file)
            return
        from rich.console import Console
        from rich.text import Text

        text = Text.from_ansi(self.format_help())
        text.highlight_regex(r"--[a-zA-Z](?:[\w.-]*\w)?", "cyan")
        Console(file=file, highlight=False).print(text, soft_wrap=True)


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """Of what an error says: of a traceback, it names the exception."""
    return str(error).strip().splitlines()[-1]


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
    except BrokenPipeError:  # whoever reads what we print has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"failed: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it can", file=sys.stderr)
        return 130
    return 0
