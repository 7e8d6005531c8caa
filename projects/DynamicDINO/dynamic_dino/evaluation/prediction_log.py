"""What an evaluation finds is written down as it comes, so that an interrupted one goes on.

Kept, although finished sets alone could be skipped more simply: one set such as LVIS (20,000
images, 31 chunks each) takes hours, and jobs on shared machines end before that.

Every process appends to a file of its own, one line a batch. The first line is the fingerprint of
the evaluation; what was found under another one is not used.
"""

from __future__ import annotations

import base64
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from detectron2.utils import comm

from ..data.fields import id_array
from .predictions import DatasetPredictions

logger = logging.getLogger(__name__)


@dataclass
class Found:
    """What was found in a batch of images.

    images       their ids
    prompts      the classes that each was asked for, as contiguous ids
    counts       detections of each
    predictions  of the first image, then of the second ...; boxes and scores as float32
    routing      `RoutingStatistics.state`; may be empty
    """

    images: list[int] | list[str]
    prompts: list[tuple[int, ...]]
    counts: list[int]
    predictions: DatasetPredictions
    routing: list[dict] = field(default_factory=list)


class PredictionLog:
    """The files of an evaluation in a folder that belongs to it. Opening it is collective.

    `done` are the images that the folder holds under the same fingerprint, in every process. A line
    that an interruption cut is dropped; its images are evaluated again. Files of another
    fingerprint are removed, and a warning says why. The number of processes may differ from that of
    the interrupted run.

    Args:
        folder: made where needed. Only the main process reads; each writes.
        fingerprint: what the predictions depend on, by name; that of the main process counts.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        self._earlier: list[Path] = []
        done, first = set(), 0
        if comm.is_main_process():
            self._earlier = self._matching_files(dict(fingerprint))
            done = {image for line in self._lines() for image in line["images"]}
            first = max((int(path.stem) for path in self._earlier), default=-1) + 1
        first, self.done, fingerprint = comm.all_gather((first, done, dict(fingerprint)))[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / f"{first + comm.get_rank():05d}.jsonl").open("w")
        self._write(fingerprint)
        self._prompts: dict[tuple[int, ...], int] = {}

    def earlier(self) -> Iterator[Found]:
        """What the interrupted evaluation found; nothing in other processes than the main one."""
        for line in self._lines():
            yield Found(
                line["images"],
                line["prompts"],
                line["counts"],
                DatasetPredictions(
                    np.repeat(id_array(line["images"]), line["counts"]),
                    _decode_ids(line["categories"]),
                    _decode(line["boxes"], "<f4").reshape(-1, 4),
                    _decode(line["scores"], "<f4"),
                ),
                line["routing"],
            )

    def append(self, found: Found) -> None:
        """Writes a batch down; from now on it survives the end of the process."""
        # A long prompt is the same for all images: it is written once.
        new = [p for p in dict.fromkeys(found.prompts) if p not in self._prompts]
        self._prompts |= {p: len(self._prompts) + i for i, p in enumerate(new)}
        self._write(
            {
                "images": found.images,
                "new_prompts": new,
                "prompts": [self._prompts[prompt] for prompt in found.prompts],
                "counts": found.counts,
                "categories": _encode_ids(found.predictions.category_ids),
                "boxes": _encode(found.predictions.boxes, "<f4"),
                "scores": _encode(found.predictions.scores, "<f4"),
                "routing": found.routing,
            }
        )

    def remove(self) -> None:
        """The evaluation is complete: its results are elsewhere. Collective."""
        self._file.close()
        comm.synchronize()
        if comm.is_main_process():
            shutil.rmtree(self.folder)

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _matching_files(self, fingerprint: dict[str, str]) -> list[Path]:
        files = sorted(self.folder.glob("*.jsonl"))
        headers = {path: next(_complete_lines(path), None) for path in files}
        for header in headers.values():
            if header not in (None, fingerprint):
                other = [key for key in fingerprint if header.get(key) != fingerprint[key]]
                logger.warning(
                    f"{self.folder} holds what an interrupted evaluation found with another "
                    f"{' and another '.join(other)}: it is removed, and all images are evaluated"
                )
                shutil.rmtree(self.folder)
                return []
        return [path for path, header in headers.items() if header is not None]

    def _lines(self) -> Iterator[dict]:
        for path in self._earlier:
            lines, prompts = _complete_lines(path), []
            next(lines)
            for line in lines:
                prompts += map(tuple, line["new_prompts"])
                yield line | {"prompts": [prompts[i] for i in line["prompts"]]}


def _complete_lines(path: Path) -> Iterator[dict]:
    """The lines of a file, without the last one if an interruption cut it short."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                content = json.loads(line)
            except ValueError:
                return
            yield content


def _encode_ids(ids: np.ndarray) -> str | list:
    """Text, and numbers that int64 doesn't hold, are rare: they are written as they are."""
    return _encode(ids, "<i8") if ids.dtype == np.int64 else ids.tolist()


def _decode_ids(found: str | list) -> np.ndarray:
    return id_array(found) if isinstance(found, list) else _decode(found, "<i8")


def _encode(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype)).decode()


def _decode(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
