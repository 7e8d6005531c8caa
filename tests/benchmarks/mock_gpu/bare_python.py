"""Hides what is installed here and isn't on a bare machine with a GPU.

A process started with BARE_PYTHON=torch,numpy,... imports, of all installed distributions, only
these and what they require; what lies elsewhere on the path, such as a checkout, as always.
"""

from __future__ import annotations

import os
import re
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder


def closure(names: list[str]) -> set[str]:
    """The distributions of these names and, over and over, what they require without extras."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonical(waiting.pop())
        if name in found:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # another platform's
        found.add(name)
        for requirement in map(Requirement, required):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def hidden_modules(names: list[str]) -> set[str]:
    """Top-level modules of all other distributions."""
    kept = closure(names)
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if not kept & set(map(canonical, owners))
    }


class Finder(PathFinder):
    """Python's own, but for hidden modules, which it looks for outside the installed packages."""

    hidden: set[str] = set()

    @classmethod
    def find_spec(cls, name: str, path=None, target=None) -> ModuleSpec | None:
        if path is None and name in cls.hidden:
            installed = ("site-packages", "dist-packages")
            path = [folder for folder in sys.path if not folder.endswith(installed)]
        return super().find_spec(name, path, target)


def install() -> None:
    if "BARE_PYTHON" not in os.environ:
        return
    if "BARE_PYTHON_HIDES" not in os.environ:  # reading all metadata takes a second: once
        hidden = hidden_modules(os.environ["BARE_PYTHON"].split(","))
        os.environ["BARE_PYTHON_HIDES"] = ",".join(sorted(hidden))
    Finder.hidden = set(os.environ["BARE_PYTHON_HIDES"].split(","))
    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
