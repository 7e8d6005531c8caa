"""Values of overrides: what holds text takes what was typed; all else is read by hydra's grammar.

A path may have any character (spaces, commas, brackets, ``=``, ``#``, ``$``), and a name may look
like a number. Whether a key holds text is known from the recipe: from the value that it has or, for
one that is None or absent, from the type of the parameter that it is, or that refers to it.
"""

from __future__ import annotations

import re
import shlex
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CALLABLE = "{_target_:"  # an override that begins so builds something; see `apply_overrides`
_ITEM = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|([^,]*?))\s*(?:,|$)""")


def read_value(cfg: DictConfig, key: str, typed: str, hint: Any = None) -> Any:
    """What an override's text, `typed`, stands for, as OmegaConf stores it.

    `hint` is the type of a key that is no parameter of a callable.

    * A key that holds text takes it as it stands; "${KEY}" alone, of a key of the recipe, refers to
      that. Where the parameter takes other types too (``str | None``, ``str | int``, ``str |
      Sequence[str]``), ``null``, a whole number or ``[a,b]`` are these.
    * A list of texts, ``[a,b]``, takes each of them as it stands, without the spaces around it; one
      with a comma is quoted.
    * All else is read by hydra's grammar.

    Raises ValueError for what the grammar can't read, with the form to type instead.
    """
    present = _present(cfg, key)
    own = set(_own_types(cfg, key)) | set(_members(hint))
    if typed.startswith(CALLABLE):
        return _by_grammar(key, typed, present)
    bracketed = typed.startswith("[") and typed.endswith("]")
    if isinstance(present, str) or present is None:
        declared = own or set(_types_of_referrers(cfg, key))
        if bracketed and Sequence in declared:
            return [_literal(cfg, item) for item in _items(typed)]
        if present is not None:
            if typed == "null" and type(None) in own:
                return None
            if int in own and re.fullmatch(r"-?(0|[1-9]\d*)", typed):
                return int(typed)
            return _literal(cfg, typed)
        if str in declared and not declared & {int, float, bool}:
            return _literal(cfg, typed)
    elif OmegaConf.is_list(present):
        declared = own | set(_types_of_referrers(cfg, key))
        texts = len(present) > 0 and all(isinstance(item, str) for item in present)
        if bracketed and (texts or Sequence in declared):
            return [_literal(cfg, item) for item in _items(typed)]
        if str in own and not bracketed:
            return _literal(cfg, typed)
    value = _by_grammar(key, typed, present)
    counted = int in own or (type(present) is int and not own)
    if isinstance(value, float) and value.is_integer() and counted and float not in own:
        return int(value)  # 1e3 of whatever is counted
    return value


def _present(cfg: DictConfig, key: str) -> Any:
    """Its value, references followed; None where these lead nowhere, or it isn't there."""
    try:
        return OmegaConf.select(cfg, key, throw_on_missing=False)
    except OmegaConfBaseException:
        return None


def _own_types(cfg: DictConfig, key: str) -> Iterator[Any]:
    parent, _, name = key.rpartition(".")
    return _parameter_types(OmegaConf.select(cfg, parent) if parent else cfg, name)


def _types_of_referrers(cfg: DictConfig, key: str) -> Iterator[Any]:
    """The types of the parameters whose value is ``${key}``."""
    for node in _nodes(OmegaConf.to_container(cfg, resolve=False)):
        for name, value in node.items():
            if value == f"${{{key}}}":
                yield from _parameter_types(node, name)


def _nodes(content: Any) -> Iterator[Mapping]:
    if isinstance(content, Mapping):
        yield content
        content = content.values()
    if isinstance(content, Iterable) and not isinstance(content, str):
        for item in content:
            yield from _nodes(item)


def _parameter_types(node: Any, name: str) -> Iterator[Any]:
    """What the callable of a lazy node takes as `name`: members of a union one by one, a path as
    str, a list of texts as `Sequence`. Nothing where that isn't declared."""
    if not isinstance(node, Mapping):
        return
    target = node.get("_target_")
    target = locate(target) if isinstance(target, str) else target
    try:
        hints = typing.get_type_hints(target.__init__ if isinstance(target, type) else target)
    except (TypeError, NameError, AttributeError):  # no callable, or names known to a checker only
        return
    yield from _members(hints.get(name))


def _members(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _members(member)
    elif isinstance(typing.get_origin(hint), type) and issubclass(
        typing.get_origin(hint), Sequence
    ):
        inner = typing.get_args(hint)
        if any(isinstance(i, typing.ForwardRef) or str in _members(i) for i in inner):
            yield Sequence
    elif hint is not None:
        yield str if hint is Path else hint


def _items(typed: str) -> list[str]:
    inner, found, at = typed[1:-1], [], 0
    if not inner.strip():
        return []
    while True:
        item = _ITEM.match(inner, at)
        double, single, plain = item.groups()
        quoted = double if double is not None else single
        found.append(plain if quoted is None else re.sub(r"\\([\"'])", r"\1", quoted))
        at = item.end()
        if not item[0].endswith(","):
            return found


def _literal(cfg: DictConfig, text: str) -> str:
    """Text that OmegaConf gives back as it stands: not as a reference, nor as a value to come."""
    if text == "???":
        raise ValueError("'???' stands for a value that is missing: give another")
    whole = re.fullmatch(r"\$\{([\w.]+)\}", text)
    if whole and OmegaConf.select(cfg, whole[1], throw_on_missing=False) is not None:
        return text
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def _by_grammar(key: str, typed: str, present: Any) -> Any:
    try:
        return OverridesParser.create().parse_override(f"key={typed}").value()
    except Exception as error:  # hydra's are of many types
        hint = ""
        if not isinstance(present, bool | int | float) and not OmegaConf.is_config(present):
            quoted = QuotedString(typed, Quote.double).with_quotes()
            hint = f"; if it is a text, quote it: {shlex.quote(f'{key}={quoted}')}"
        elif OmegaConf.is_list(present) and typed.startswith("["):
            quoted = ",".join(f'"{item}"' for item in _items(typed.removesuffix("]") + "]"))
            hint = f"; if it is a list of texts, quote them: {shlex.quote(f'{key}=[{quoted}]')}"
        reason = " ".join(str(error).split())
        raise ValueError(f"override {f'{key}={typed}'!r} can't be parsed: {reason}{hint}") from None
