"""What an evaluation finds is written down as it comes, so that an interrupted one goes on.

Kept, although finished sets alone could be skipped more simply: one set such as LVIS (20,000
images, 31 chunks each) takes hours, and jobs on shared machines end before that.

Every process appends to a file of its own, one line a batch, see `packing`. The first line is the
fingerprint of the evaluation, as text; what was found under another one is not used. Each line
begins with its checksum: what a disk or a hand changed is left out, as is a line that occurs twice,
and its images are evaluated again.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from detectron2.utils import comm

from ..console import some
from ..data.fields import id_array
from ..files import DiskFullError, LogFile
from .packing import pack, unpack
from .predictions import DatasetPredictions

FORM = {"form of the log": "packed"}  # in the fingerprint; older ones have none
SUFFIXES = (".log", ".jsonl")  # of today's files, of older ones

logger = logging.getLogger(__name__)


@dataclass
class Found:
    """What was found in a batch of images.

    images       their ids
    prompts      the classes that each was asked for, as contiguous ids
    counts       detections of each, those that can count
    predictions  of the first image, then of the second ...; boxes and scores as float32
    routing      `RoutingStatistics.state`; may be empty
    """

    images: list[int] | list[str]
    prompts: list[tuple[int, ...]]
    counts: list[int]
    predictions: DatasetPredictions
    routing: list[dict] = field(default_factory=list)

    def only(self, rows: np.ndarray) -> Found:
        """With those of the predictions, bool [N], and all images."""
        image = np.repeat(np.arange(len(self.images)), self.counts)
        counts = np.bincount(image[rows], minlength=len(self.images)).tolist()
        return replace(self, counts=counts, predictions=self.predictions[rows])


class PredictionLog:
    """The files of an evaluation in a folder that belongs to it. Opening it is collective.

    `done` are the images that the folder holds under the same fingerprint, in every process. A line
    that an interruption cut is dropped; its images are evaluated again. So are those of damaged
    lines, which a warning names. Files of another fingerprint are removed, and a warning says why.
    The number of processes may differ from that of the interrupted run. `notes` is a folder in it
    for what processes tell each other, which doesn't outlive them.

    Args:
        folder: made where needed. Only the main process reads; each writes.
        fingerprint: what the predictions depend on, by name; that of the main process counts.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        self.notes = self.folder / "notes"
        self._earlier: list[Path] = []
        self._warned: set[Path] = set()
        done, first, evidence = set(), 0, {**fingerprint, **FORM}
        if comm.is_main_process():
            if not self.folder.is_dir():
                self.folder.unlink(missing_ok=True)
            shutil.rmtree(self.notes, ignore_errors=True)
            self._earlier = self._matching_files(evidence)
            done = {image for line in self._lines() for image in line["images"]}
            names = (path.stem for path in self._files())
            first = max((int(name) for name in names if name.isdigit()), default=-1) + 1
        first, self.done, evidence = comm.all_gather((first, done, evidence))[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = LogFile(self.folder / f"{first + comm.get_rank():05d}.log", "w")
        self._write(json.dumps(evidence).encode())
        self._prompts: dict[tuple[int, ...], int] = {}

    def earlier(self) -> Iterator[Found]:
        """What the interrupted evaluation found; nothing in other processes than the main one."""
        for line in self._lines():
            yield Found(
                line["images"],
                line["prompts"],
                line["counts"],
                DatasetPredictions(
                    np.repeat(id_array(line["images"]), line["counts"]), *line["detections"]
                ),
                line["routing"],
            )

    def append(self, found: Found) -> None:
        """Writes a batch down; from now on it survives the end of the process, unless the disk is
        full, see `LogFile`."""
        # A long prompt is the same for all images: it is written once.
        new = [p for p in dict.fromkeys(found.prompts) if p not in self._prompts]
        self._prompts |= {p: len(self._prompts) + i for i, p in enumerate(new)}
        head = {
            "images": found.images,
            "new_prompts": [[self._prompts[prompt], prompt] for prompt in new],
            "prompts": [self._prompts[prompt] for prompt in found.prompts],
            "counts": found.counts,
            "routing": found.routing,
        }
        self._write(pack(head, found.predictions))

    def remove(self) -> None:
        """The evaluation is complete: its results are elsewhere. Collective."""
        with suppress(DiskFullError):
            self._file.close()
        comm.synchronize()
        if comm.is_main_process():
            shutil.rmtree(self.folder)

    def _write(self, content: bytes) -> None:
        self._file.write(_checksum(content) + b" " + content + b"\n")
        self._file.flush()

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*") if path.suffix in SUFFIXES)

    def _matching_files(self, fingerprint: dict[str, str]) -> list[Path]:
        headers = {path: self._header(path) for path in self._files()}
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

    def _header(self, path: Path) -> dict | None:
        number, header = next(numbered_lines(path), (1, None))
        if number == 1 and header is not None:
            return header
        if path.stat().st_size and number == 1:
            logger.warning("%s, line 1 is damaged: its images are evaluated again", path)
        return None

    def _lines(self) -> Iterator[dict]:
        """The lines that can be used, each image once. Warnings come when it is gone through for
        the first time."""
        seen: set[int | str] = set()
        for path in self._earlier:
            prompts: dict[int, tuple[int, ...]] = {}
            left_out: list[str] = []
            for number, line in numbered_lines(path):
                if number == 1:
                    continue
                if line is not None:
                    prompts |= {index: tuple(prompt) for index, prompt in line["new_prompts"]}
                # A line is used as a whole: what it says of the routing is of all of its images.
                if line is None:
                    left_out.append(str(number))
                elif not prompts.keys() >= {*line["prompts"]}:
                    left_out.append(f"{number} (its prompt is lost)")
                elif not seen.isdisjoint(line["images"]):
                    left_out.append(f"{number} (a second time)")
                else:
                    seen.update(line["images"])
                    yield line | {"prompts": [prompts[i] for i in line["prompts"]]}
            if left_out and path not in self._warned:
                self._warned.add(path)
                logger.warning(
                    "%s is damaged, line %s: images that only stand there are evaluated again",
                    path,
                    some(left_out),
                )


def numbered_lines(path: Path) -> Iterator[tuple[int, dict | None]]:
    """The lines of a file from 1 on, None for a damaged one; without a last one that an
    interruption cut short. The first is the fingerprint; others also have "detections", what
    `unpack` returns of them."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            checksum, _, content = line.rstrip(b"\n").partition(b" ")
            found = None
            with suppress(ValueError):  # right, but not of this place
                if checksum == _checksum(content):
                    found = json.loads(content) if number == 1 else _line(content)
            if found is not None or line.endswith(b"\n"):
                yield number, found


def _line(content: bytes) -> dict:
    head, *detections = unpack(content)
    return head | {"detections": detections}


def _checksum(content: bytes) -> bytes:
    return b"%08x" % zlib.crc32(content)
