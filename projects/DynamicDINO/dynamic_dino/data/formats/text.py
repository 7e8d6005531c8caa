"""Text and JSON files, with one error for what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..json_stream import JsonError, load_json
from ..problems import DataError


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark; raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"not text in UTF-8 ({error.reason}): save it as UTF-8"
        raise DataError("unreadable file", what, str(path)) from None


def read_json(path: Path) -> Any:
    """Raises DataError."""
    try:
        return load_json(path)
    except JsonError as error:
        raise DataError("unreadable file", error.what, str(path)) from None


def read_lines(path: Path) -> list[str]:
    """The lines that aren't blank, without spaces around them; raises DataError."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]
