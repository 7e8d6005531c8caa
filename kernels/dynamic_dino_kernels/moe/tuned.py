"""Tiles, and the tables of measured ones: one is shipped, one is written by a user's `tune`.

A table is a JSON object, `Problem.key` -> fields of `Tiles`. The user's file is
``~/.cache/dynamic_dino_kernels/tuned.json``, or what DYNAMIC_DINO_KERNELS_TUNED names.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_name("tuned.json")
ENVIRONMENT_VARIABLE = "DYNAMIC_DINO_KERNELS_TUNED"
FORMS = ("fused", "two_gemms")


@dataclass(frozen=True)
class Tiles:
    """One way to run the expert FFN.

    form    "fused" (one launch, the hidden layer stays on the chip) or "two_gemms"
    rows    of a tile, slots of one expert
    hidden  hidden units at a time (fused, and backward)
    splits  programs that share the hidden units of a tile (fused, and backward)
    warps   per program
    stages  of the software pipeline

    Raises:
        ValueError: a value that no kernel takes.
    """

    form: str = "fused"
    rows: int = 32
    hidden: int = 32
    splits: int = 1
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form is {self.form!r}: choose one of {', '.join(FORMS)}")
        for name in ("rows", "hidden", "splits", "warps", "stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: give a positive integer")
            if name in ("rows", "hidden", "warps") and value & (value - 1):
                raise ValueError(f"{name} is {value}: give a power of two")


def user_file() -> Path:
    """Where `tune` writes, and what is read before the shipped table."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named).expanduser() if named else caches / "dynamic_dino_kernels" / "tuned.json"


@cache
def table() -> dict[str, Tiles]:
    """All that was measured; the user's own entries win. Read once a process. A user's file that
    can't be read is said once in the log, and then as good as empty."""
    from_user: dict[str, Tiles] = {}
    try:
        from_user = read(user_file())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.warning(
            "The measured tiles in %s are ignored: %s. Delete the file, or let `python -m "
            "dynamic_dino_kernels.tune` write it anew",
            _name(),
            error,
        )
    return read(SHIPPED) | from_user


def read(path: Path) -> dict[str, Tiles]:
    """The table in a file; empty if there is none.

    Raises:
        OSError: the file can't be read.
        ValueError: it holds something else than a table.
    """
    if not path.exists():
        return {}
    entries = json.loads(path.read_text())
    if not isinstance(entries, dict):
        raise ValueError("it holds no JSON object")
    tiles = {}
    for key, fields in entries.items():
        try:
            tiles[key] = Tiles(**fields)
        except TypeError as error:
            raise ValueError(f"entry {key!r} isn't one of Tiles: {error}") from None
    return tiles


def save(path: Path, entries: dict[str, Tiles]) -> None:
    """Adds entries to a file's table; what can't be read there is replaced. The file is whole at
    any time, so that a run that is stopped loses nothing.

    Raises:
        OSError: the file can't be written.
    """
    try:
        kept = read(path)
    except ValueError as error:
        logger.warning("%s is replaced: %s", path, error)
        kept = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: vars(tiles) for key, tiles in sorted((kept | entries).items())}
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(plain, indent=1) + "\n")
    part.replace(path)
    table.cache_clear()


def _name() -> str:
    try:
        return str(user_file())
    except RuntimeError:
        return "your cache"
