"""labels.jsonl: what is done, on the disk as it comes, so that a run that ends anywhere goes on.

The first line says what the results depend on; each other line is an image's result. A line that
wasn't written to its end is cut off: its image is looked at again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import writable_folder

FILE = "labels.jsonl"
TITLE = "settings"


class Journal:
    """The results of a folder of images, by their path in it.

    Args:
        folder: where labels.jsonl is, or will be.
        settings: what results depend on, in words: plain data. Its "threshold" may be higher than
            that of what is there, which holds for what is added too: whoever reads drops the rest.
        restart: what is there is kept as labels.jsonl.1, or the next number, and nothing is done.

    Raises ValueError: the settings are others than those of what is there; another process writes
    to it; a line is no result. OSError.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], restart: bool = False) -> None:
        self.path = writable_folder(folder, "choose another folder with --output") / FILE
        if restart and self.path.exists():
            numbered = (self.path.with_name(f"{FILE}.{i}") for i in range(1, 1 << 20))
            self.path.rename(next(free for free in numbered if not free.exists()))
        self._file = self.path.open("a+b")
        try:
            _lock(self._file, self.path)
            self.settings, self.results = self._read(json.loads(json.dumps(settings)))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, result: dict) -> None:
        """Writes an image's result, `name` among it: the image's path in the folder."""
        self._write(result)
        self.results[result["name"]] = result

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _read(self, settings: dict) -> tuple[dict, dict[str, dict]]:
        self._file.seek(0)
        results: dict[str, dict] = {}
        whole, former = 0, None
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                content = json.loads(line)
                if number == 1:
                    former = content[TITLE]
                else:
                    results[content["name"]] = content
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}, line {number}: it is no result of this command; remove the "
                    "line, or begin anew with --restart"
                ) from None
        self._file.truncate(whole)
        if former is None:
            former = settings
            self._write({TITLE: settings})
        if not _holds(former, settings):
            raise ValueError(
                f"{self.path} is of other settings: {_differences(former, settings)}. Go on with "
                "those, choose another folder with --output, or begin anew with --restart, which "
                f"keeps the former results as {FILE}.1"
            )
        return former, results


def _holds(former: dict, now: dict) -> bool:
    """Whether results of the former settings are good for these: what was found with a lower
    threshold has what is found with a higher one."""
    threshold = former["threshold"]
    return former == now | {"threshold": threshold} and threshold <= now["threshold"]


def _differences(former: dict, now: dict) -> str:
    keys = [key for key in {**former, **now} if former.get(key) != now.get(key)]
    return "; ".join(f"{key} was {_brief(former, key)}, is {_brief(now, key)}" for key in keys)


def _brief(settings: dict, key: str) -> str:
    text = json.dumps(settings.get(key), ensure_ascii=False)
    return text if len(text) < 200 else f"{text[:200]} ..."


def _lock(file: Any, path: Path) -> None:
    """Until the file is closed, or the process ends."""
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process writes to {path}: wait for it, or end it") from None
