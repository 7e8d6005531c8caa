"""Which kind of value a parameter of a recipe takes, by the type that its callable declares. Found
out before anything is built: some of what is built takes another kind, and fails much later."""

from __future__ import annotations

import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from detectron2.utils.registry import locate

NODE = "_target_"
_SAID = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    type(None): "null",
}


def of_wrong_kind(content: Any, prefix: str = "") -> str | None:
    """What is wrong with the first value in a recipe's content, plain dicts and lists, that isn't
    of the kind that the callable of its node declares; None where all are. What declares nothing,
    or a kind that isn't known here, isn't judged, nor are texts that refer to other keys. Numbers
    that callables of this package take count, weigh or measure something: they are 0 or more."""
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    target = _target(content)
    declared = _declared(target)
    ours = str(getattr(target, "__module__", None)).startswith(f"{__package__}.")
    for name, value in items:
        hint = declared.get(name, Any)
        if not _fits(value, hint):
            return f"{prefix}{name} needs {_said(hint)}, not {str(value)[:80]!r}"
        if ours and isinstance(value, int | float) and value < 0:
            return f"{prefix}{name} needs a number of at least 0, not '{value}'"
        if isinstance(value, Mapping | list):
            if wrong := of_wrong_kind(value, f"{prefix}{name}."):
                return wrong
    return None


def _target(content: Any) -> Any:
    """The callable of a node; None where it is none, or can't be imported."""
    target = content.get(NODE) if isinstance(content, Mapping) else None
    if isinstance(target, str):
        try:
            return locate(target)
        except Exception:  # whoever builds it says that it isn't there
            return None
    return target


def _declared(target: Any) -> Mapping[str, Any]:
    try:
        return _hints(target) if callable(target) else {}
    except TypeError:  # it can't be hashed
        return {}


@cache
def _hints(target: Any) -> Mapping[str, Any]:
    """Parameter -> type; one whose default is None takes it whatever is declared."""
    try:
        parameters = inspect.signature(target).parameters
        hints = typing.get_type_hints(target.__init__ if isinstance(target, type) else target)
    except (TypeError, ValueError, NameError, AttributeError):  # declared for a checker only, or C
        return {}
    return {
        name: hint | None if name in parameters and parameters[name].default is None else hint
        for name, hint in hints.items()
    }


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, str) and "${" in value or isinstance(value, Mapping) and NODE in value:
        return True  # what another key has, and what is built first
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in inner)
    if origin is Literal:
        return value in inner
    kind = origin or hint
    if not isinstance(kind, type) or kind in (Any, object, collections.abc.Callable):
        return True
    if not isinstance(value, Mapping | list | bool | int | float | str | None):
        return True  # an object
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < math.inf
    if kind in (bool, str, type(None)):
        return isinstance(value, kind)
    if kind is Path:
        return isinstance(value, str)
    try:
        if isinstance(value, list):
            many = issubclass(kind, collections.abc.Iterable) and not issubclass(kind, Mapping)
            return many and _items_fit(value, kind, inner)
        if isinstance(value, Mapping):
            return issubclass(kind, Mapping) and all(_fits(v, inner[1]) for v in value.values())
    except (TypeError, IndexError):  # a protocol; a section of anything
        return True
    return False


def _items_fit(values: list, kind: type, inner: tuple) -> bool:
    if kind is tuple and inner and Ellipsis not in inner:
        return len(values) == len(inner) and all(map(_fits, values, inner))
    return all(_fits(value, inner[0]) for value in values) if inner else True


def _said(hint: Any) -> str:
    """Completes "KEY needs ..."."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_said, inner)))
    if origin is Literal:
        return " or ".join(map(str, inner))
    kind = origin or hint
    if kind is Path:
        return "a path"
    if kind in _SAID:
        return _SAID[kind]
    if kind is tuple and inner and Ellipsis not in inner:
        return f"a list of {len(inner)}, each {' or '.join(dict.fromkeys(map(_said, inner)))}"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a section {key:value}"
    if isinstance(kind, type) and issubclass(kind, collections.abc.Sequence):
        return f"a list, each {_said(inner[0])}" if inner else "a list"
    return f"a {getattr(kind, '__name__', kind)}, {{_target_:...}}"
