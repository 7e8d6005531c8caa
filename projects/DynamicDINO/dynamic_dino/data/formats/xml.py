"""XML without entities: a file that declares any is refused, so that it can neither read other
files nor grow without end."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from ..problems import DataError


class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise DataError("unreadable file", "it has a DOCTYPE, which no annotation needs: remove it")


def read_xml(path: Path) -> Element:
    """The root element; raises DataError."""
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        return ElementTree.parse(path, parser=parser).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # also of encodings
        what = f"not valid XML ({error}): it may be truncated; write or export it again"
        raise DataError("unreadable file", what) from None


def root_tag(path: Path) -> str | None:
    """The name of the root element, None where the beginning of the file isn't XML."""
    with path.open("rb") as file:
        try:
            for _, element in ElementTree.iterparse(file, ["start"]):
                return element.tag
        except (ElementTree.ParseError, LookupError, ValueError):  # also of encodings
            return None
    return None


def text_of(element: Element, path: str) -> str:
    """The text at a path such as "size/width"; raises DataError if there is none."""
    text = (element.findtext(path) or "").strip()
    if not text:
        raise DataError("missing field", f"it has no <{path}>: add this element")
    return text


def number(text: str | None, field: str) -> float:
    """Raises DataError for what is no finite number."""
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError("malformed box", f"{field} is {text!r}, not a number: correct or remove it")
    return value
