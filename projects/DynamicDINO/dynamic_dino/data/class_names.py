"""The classes of a closed-set detector, by their names or by a data set that has them."""

from __future__ import annotations

from collections.abc import Sequence

from ..modeling.vocabulary import ClassVocabulary
from .datasets import get_metadata


def class_names(names: Sequence[str] | str) -> list[str]:
    """The names themselves, or those of a data set (a registered name, or the path of its file).

    Raises ValueError for a data set without classes.
    """
    if not isinstance(names, str):
        return list(names)
    found = list(get_metadata(names).thing_classes)
    if not found:
        raise ValueError(
            f"a closed-set detector needs the names of its classes, but data set {names!r} has none"
        )
    return found


def class_vocabulary(names: Sequence[str] | str) -> ClassVocabulary:
    """The vocabulary of a recipe; see `class_names`."""
    return ClassVocabulary(class_names(names))


def count_classes(names: Sequence[str] | str) -> int:
    """How many there are, for the heads of a recipe; see `class_names`."""
    return len(class_names(names))
