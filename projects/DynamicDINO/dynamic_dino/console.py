"""What the command lines of this package have in common: no letter of a name ends a program, and a
missing Detectron2 is an error that says how to install it; its usage names it as it was called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# pip can't bring it as a dependency: it is not on PyPI under its own name.
DETECTRON2 = (
    "Detectron2 is not installed: `dynamic-dino install-detectron2` does that, from PyPI, without "
    "a compiler (or: python -m dynamic_dino.install_detectron2)"
)
_called: str | None = None
_usual_ending = sys.excepthook


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
    standard output would raise UnicodeEncodeError. Files are in UTF-8 all the same. A missing
    Detectron2 ends it with one line."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for stream in (sys.stdout, sys.stderr):
            # Others, such as "replace" in PYTHONIOENCODING, are the user's choice.
            if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
                if reconfigure := getattr(stream, "reconfigure", None):  # a notebook's has none
                    reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except ModuleNotFoundError as error:
            if error.name != "detectron2":
                raise
            raise SystemExit(fail(DETECTRON2)) from None

    return run


@contextmanager
def called_as(name: str) -> Iterator[None]:
    """Programs that begin in it are called so."""
    global _called
    before, _called = _called, name
    try:
        yield
    finally:
        _called = before


def program() -> str | None:
    """What the user typed to start this program, for its usage; None: the name of the script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if _called is None and spec is not None and spec.name.startswith(f"{__package__}."):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return _called


def is_looked_for() -> bool:
    """Whether Python was started as ``python -m dynamic_dino.PROGRAM``, and looks for that now."""
    words = iter(sys.orig_argv[1:])
    module = next((word[2:] or next(words, "") for word in words if word.startswith("-m")), "")
    return sys.argv[:1] == ["-m"] and module.startswith(f"{__package__}.")


def ending(error: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of such a program, whose packages are imported before `command` begins: one
    line where Detectron2 is missing."""
    if isinstance(value, ModuleNotFoundError) and value.name == "detectron2":
        raise SystemExit(fail(DETECTRON2))
    _usual_ending(error, value, trace)


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
