"""What can be wrong with a data set, and what is done about it.

Readers hand each `DataError` to a reporter. The default one raises, so that training meets one
clear error; `Dropped` lets boxes go that published files are known to get wrong; `python -m
dynamic_dino.data check` collects them all. When the reporter returns, the reader leaves out what
the problem is about.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

logger = logging.getLogger(__name__)

BadBoxes = Literal["error", "drop"]
# kinds of problems that concern one box and its phrase
BOX_KINDS = (
    "malformed box",
    "empty box",
    "box outside the image",
    "mixed box conventions",
    "phrase outside the caption",
)


class DataError(Exception):
    """One thing that is wrong with a data set.

    Raised about an item by code that doesn't know where the item stands; the reader adds the place
    with `at` and hands it to its reporter.

    Args:
        kind: a few words by which problems are counted, such as "empty box".
        what: what is wrong, and how to repair it.
        where: the file, and the place in it.
    """

    def __init__(self, kind: str, what: str, where: str = "") -> None:
        super().__init__(f"{where}: {what}" if where else what)
        self.kind, self.what, self.where = kind, what, where

    def at(self, where: str) -> DataError:
        return DataError(self.kind, self.what, where)


Reporter = Callable[[DataError], None]


def require_fields(item: Any, *fields: str) -> None:
    """Raises DataError for a field that the item lacks."""
    for field in fields:
        if not isinstance(item, dict) or item.get(field) is None:
            raise DataError("missing field", f"it has no {field!r}: add this field")


def refuse(problem: DataError) -> None:
    """The reporter that raises each problem as a ValueError."""
    raise ValueError(str(problem))


class Dropped:
    """Counts problems of single boxes, whose annotations are left out, and refuses all others."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, problem: DataError) -> None:
        if problem.kind not in BOX_KINDS:
            refuse(problem)
        self.counts[problem.kind] += 1

    def log(self, file: object) -> None:
        if self.counts:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in self.counts.items())
            logger.warning("%s: dropped %d boxes (%s)", file, self.counts.total(), kinds)
