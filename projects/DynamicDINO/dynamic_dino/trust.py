"""Which code the config.yaml of a run may call.

A recipe in Python is code, and whoever runs it knows. A config.yaml looks like data and comes with
somebody's weights, but its ``_target_``s name what is called with which arguments, and YAML has
tags that do the same. So it may name classes and functions of these modules only, and of those
that the user says to trust. docs/trust.md says what else is code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from detectron2.utils.registry import locate

# Modules, each with all below it, that define what recipes build: nothing in them writes a file,
# starts a program or calls what an argument names.
KNOWN = (
    "detectron2.data.transforms",
    "detectron2.solver",
    "dynamic_dino.data.class_names",
    "dynamic_dino.data.datasets",
    "dynamic_dino.data.loader",
    "dynamic_dino.data.mapper",
    "dynamic_dino.engine.optim",
    "dynamic_dino.evaluation.evaluator",
    "dynamic_dino.modeling",
    "dynamic_dino.moe",
    "fvcore.common.param_scheduler",
    "pathlib",
    "torch.nn",
    "torch.optim",
)
TRUST = "DYNAMIC_DINO_TRUST"  # further modules, with commas between them


class UntrustedError(ValueError):
    """A config.yaml names code that isn't known."""


def require_known_targets(content: Any) -> None:
    """Raises `UntrustedError` for a ``_target_``, or the import path of a protocol, that names no
    class or function of a known module."""
    for node in _nodes(content):
        for key in ("_target_", "protocol"):
            name = node.get(key)
            if isinstance(name, str) and (key == "_target_" or "." in name):
                require_known(name)


def require_known(name: str) -> None:
    """Raises `UntrustedError` unless an import path is that of a class or a function, not a method,
    that a known module defines. Others aren't imported to find that out."""
    trusted = [part.strip() for part in os.environ.get(TRUST, "").split(",") if part.strip()]
    if _below(name, trusted):
        return
    if _below(name, {known.partition(".")[0] for known in KNOWN}):
        try:
            found = locate(name)
        except Exception:  # whoever builds it says that it isn't there
            return
        where, what = getattr(found, "__module__", None), getattr(found, "__qualname__", ".")
        # By where it is defined: torch.nn.os.system is reached through torch.nn.
        if isinstance(where, str) and _below(where, KNOWN) and "." not in what:
            return
    module = name.partition(".")[0]
    raise UntrustedError(
        f"it calls {name[:100]!r}, which is of no module that a recipe needs; a config.yaml from "
        "somebody else could run anything so. If you wrote it, or trust who did, set the "
        f"environment variable {TRUST}={module}"
    )


class Loader(yaml.UnsafeLoader):
    """Reads what `yaml.dump` wrote, with tags that name what `require_known` lets through."""

    def find_python_module(self, name: str, mark: Any) -> Any:
        require_known(name)
        return super().find_python_module(name, mark)

    def find_python_name(self, name: str, mark: Any) -> Any:
        require_known(name)
        return super().find_python_name(name, mark)


def _below(name: str, modules: Any) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _nodes(content: Any) -> Iterator[Mapping]:
    if isinstance(content, Mapping):
        yield content
        content = list(content.values())
    if isinstance(content, list | tuple):
        for item in content:
            yield from _nodes(item)
