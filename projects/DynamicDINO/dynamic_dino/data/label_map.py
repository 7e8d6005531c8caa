"""label_map.json, the classes of ODVG detection files as Open-GroundingDino wants them: a number as
text -> name, for all files of the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..files import write_text

NAME = "label_map.json"


def read_label_map(jsonl_file: Path) -> list[str]:
    """The classes of an ODVG file in the order of their numbers; [] without a label map.

    Raises ValueError for one that isn't a number -> name each.
    """
    path = jsonl_file.with_name(NAME)
    if not path.is_file():
        return []
    try:
        numbered = {int(key): name for key, name in json.loads(path.read_bytes()).items()}
        if not all(isinstance(name, str) and name.strip() for name in numbered.values()):
            raise ValueError("a name is empty, or no text")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f'{path} is no label map ({error}): write {{"0": "first name", "1": ...}}, or remove '
            f"it, and classes are numbered in the order in which {jsonl_file.name} has them"
        ) from None
    return [numbered[number] for number in sorted(numbered)]


def write_label_map(jsonl_file: Path, names: Sequence[str]) -> Path:
    """Raises ValueError where other files of the folder have another label map."""
    path = jsonl_file.with_name(NAME)
    others = [f.name for f in path.parent.glob("*.jsonl") if f.name != jsonl_file.name]
    if path.is_file() and others and read_label_map(jsonl_file) != list(names):
        raise ValueError(
            f"{path} has other classes, and belongs to {others[0]}: write {jsonl_file.name} to "
            "another folder"
        )
    numbered = {str(i): name for i, name in enumerate(names)}
    write_text(path, json.dumps(numbered, ensure_ascii=False, indent=1) + "\n")
    return path
