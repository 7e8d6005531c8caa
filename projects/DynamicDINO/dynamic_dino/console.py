"""What the command lines of this package have in common: no letter of a name ends a program."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def command(main: Callable[P, R]) -> Callable[P, R]:
    """Decorates what a program, or a process of it, begins with: letters that the console can't
    show (cp1252 and ASCII lack most of the world's) are printed as ``\\u9c88``, where Python's
    standard output would raise UnicodeEncodeError. Files are in UTF-8 all the same."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for stream in (sys.stdout, sys.stderr):
            # Others, such as "replace" in PYTHONIOENCODING, are the user's choice.
            if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
                if reconfigure := getattr(stream, "reconfigure", None):  # a notebook's has none
                    reconfigure(errors="backslashreplace")
        return main(*args, **kwargs)

    return run


def headline(number: int, of: int, text: str) -> None:
    """Prints the headline of a program's step."""
    print(f"\n[{number}/{of}] {text}", flush=True)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of them for a message, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
