"""What the command lines of this package have in common: no letter of a name ends a program, and a
missing Detectron2 is an error that says how to install it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# pip can't bring it as a dependency: it is not on PyPI under its own name.
DETECTRON2 = (
    "Detectron2 is not installed: `dynamic-dino install-detectron2` does that, from PyPI, without "
    "a compiler (or: python -m dynamic_dino.install_detectron2)"
)


@contextmanager
def named_remedy() -> Iterator[None]:
    """A ModuleNotFoundError of Detectron2 from inside of it says what to do."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise ModuleNotFoundError(DETECTRON2, name=error.name) from None


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


def fail(message: object) -> int:
    """One line on stderr, and the exit status that goes with it."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def headline(number: int, of: int, text: str) -> None:
    """Prints the headline of a program's step."""
    print(f"\n[{number}/{of}] {text}", flush=True)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of them for a message, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
