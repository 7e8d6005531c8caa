"""What can be wrong with a data set, and what is done about it.

Readers hand each `Problem` to a reporter. The default one raises, so that training meets one clear
error; `Dropped` lets boxes go that published files are known to get wrong; `python -m
dynamic_dino.data check` collects them all. When the reporter returns, the reader leaves out what
the problem is about.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: its kind, the file and place, what it is and how to repair it."""

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Fault(Exception):
    """What is wrong with an item, raised where it is found; the reader knows the place."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what

    def at(self, where: str) -> Problem:
        return Problem(self.kind, where, self.what)


Report = Callable[[Problem], None]


def require(item: Any, *fields: str) -> None:
    """Raises Fault for a field that the item lacks."""
    for field in fields:
        if not isinstance(item, dict) or item.get(field) is None:
            raise Fault("missing field", f"it has no {field!r}: add this field")


def refuse(problem: Problem) -> None:
    """Raises the problem as a ValueError."""
    raise ValueError(str(problem))


class Dropped:
    """Counts problems of single boxes, whose annotations are left out, and refuses all others."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, problem: Problem) -> None:
        if problem.kind not in BOX_KINDS:
            refuse(problem)
        self.counts[problem.kind] += 1

    def log(self, file: object) -> None:
        if self.counts:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in self.counts.items())
            logger.warning("%s: dropped %d boxes (%s)", file, self.counts.total(), kinds)
