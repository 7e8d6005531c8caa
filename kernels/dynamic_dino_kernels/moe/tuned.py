"""The tables of measured tiles: one that is shipped, and one that a user's `tune` has written.

A table is a JSON object, `Problem.key` -> fields of `Tiles`. The user's file is
``~/.cache/dynamic_dino_kernels/tuned.json``, or what DYNAMIC_DINO_KERNELS_TUNED names.
"""

from __future__ import annotations

import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tiles import Tiles

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_name("tuned.json")
ENVIRONMENT_VARIABLE = "DYNAMIC_DINO_KERNELS_TUNED"


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
    from .tiles import Tiles

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
