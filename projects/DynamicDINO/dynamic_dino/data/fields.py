"""What may stand in a field of an annotation file: types are checked here, once, for training,
`check` and scoring alike.

Exporters and scripts write numbers as text, 1.0 for 1, "0" for false. What can mean one thing only
is read as that; everything else is a `DataError`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np

from .problems import DataError

Id = int | str
FALSE, TRUE = ("", "0", "0.0", "false", "no"), ("1", "1.0", "true", "yes")


def read_id(value: Any, field: str) -> Id:
    """A whole number of any size (1.0 is 1), or text."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if is_text(value):
        return value
    raise DataError("bad id", f"{field!r} is {brief(value)}: write a whole number or text")


def read_flag(value: Any, field: str) -> bool:
    """0, 1, true, false, also as text or as 1.0; null is false."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word is None or word in FALSE or (isinstance(word, int | float) and word == 0):
        return False
    if word in TRUE or (isinstance(word, int | float) and word == 1):
        return True
    raise DataError("bad flag", f"{field!r} is {brief(value)}: write 0 or 1")


def read_number(value: Any) -> float:
    """A number, also as text; NaN for everything else."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        return math.nan
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return math.nan


def read_finite(value: Any) -> float:
    """`read_number`; raises ValueError for what is no finite number."""
    number = read_number(value)
    if not math.isfinite(number):
        raise ValueError(f"{brief(value)} is no number")
    return number


def read_path(item: dict, field: str) -> str:
    """The name of a file."""
    value = item[field]
    if not is_text(value) or not value.strip() or "\0" in value:
        raise DataError("missing field", f"{field!r} is {brief(value)}: write a path")
    return value


def read_name(value: Any, what: str) -> str:
    """A name that a text encoder can read; `what` stands before it in the message."""
    if not is_text(value) or not any(map(str.isalnum, value)) or "\0" in value:
        what = f"{what} {brief(value)}: write what it is in plain words, the detector reads it"
        raise DataError("category without a name", what)
    return value


def read_list(item: dict, field: str) -> list:
    value = item[field]
    if not isinstance(value, list | tuple):
        raise DataError("missing field", f"{field!r} is {brief(value)}: write a list")
    return list(value)


def is_text(value: Any) -> bool:
    """Half of a surrogate pair, which JSON can hold, is no text: it can't be written anywhere."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def brief(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def id_array(ids: Iterable[Id]) -> np.ndarray:
    """[N] int64, text, or objects where numbers are larger than int64 holds; never rounded."""
    ids = list(ids)
    if all(isinstance(i, str) for i in ids) and ids:
        return np.array(ids)
    try:
        return np.array(ids, dtype=np.int64)
    except (OverflowError, ValueError):
        return np.array(ids, dtype=object)


def fits_int64(value: Id) -> bool:
    return isinstance(value, int) and -(1 << 63) < value < 1 << 63
