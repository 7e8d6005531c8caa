"""`label_folder`: every image of a folder is looked at once, however often it is begun."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.image_files import files_under, is_picture
from ..data.images import load_image
from ..files import write_text
from ..modeling.prompt import Prompt
from ..serving.inference import Detector, detect_each, detection_records
from ..serving.labels import write_labels
from ..serving.prompts import PromptLike, as_prompt
from .journal import Journal

PREDICTIONS = "predictions.json"


@dataclass
class Labels:
    """What was found in a folder.

    Args:
        results: of each image, in the order of their paths: name (its path in the folder), file,
            width, height, bytes (of the file), prompt, and detections with phrase, score and box.
        fresh: how many of them are of this run.
        failed: [(name, why)] of images that can't be looked at.
        files: what was written.
    """

    names: list[str]
    results: list[dict]
    fresh: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    @property
    def boxes(self) -> Counter[str]:
        """How often each name was found, 0 for never."""
        found = Counter(d["phrase"] for r in self.results for d in r["detections"])
        return Counter({name: found[name] for name in self.names})

    @property
    def images(self) -> Counter[str]:
        """In how many images each name was found."""
        return Counter(p for r in self.results for p in {d["phrase"] for d in r["detections"]})


def label_folder(
    detector: Detector,
    folder: str | Path,
    prompt: PromptLike,
    output: str | Path,
    formats: Sequence[str] = ("coco",),
    threshold: float | None = None,
    max_detections: int | None = None,
    nms: float | None = None,
    nms_agnostic: bool | None = None,
    settings: dict[str, Any] | None = None,
    restart: bool = False,
    workers: int = 4,
    progress: bool = True,
) -> Labels:
    """Looks for the phrases in all images of a folder and of the folders in it.

    Results go to labels.jsonl in `output` one by one. A run that was ended, by whatever, goes on
    there when it is called again, and new images are added; an image whose file has another length
    than before is looked at again. At the end, predictions.json has all results and each format of
    `serving.labels.WRITERS` its files. Images are read in threads while the model runs.

    Args:
        detector: `load_detector`'s, or a `TiledDetector`.
        threshold, max_detections, nms, nms_agnostic: the detector's by default.
        settings: what else the results depend on, such as the model: plain data. Others than those
            of what is in `output` are refused, but a higher threshold: of what was found with a
            lower one, its part is taken.
        restart: nothing is taken over from labels.jsonl, which is kept as labels.jsonl.1.
        workers: threads that read images.

    Raises:
        ValueError: for other settings, a prompt that is none, an option out of its range.
        FileNotFoundError: the folder has no image. OSError: `output` can't be written to.
    """
    folder, output, prompt = Path(folder), Path(output), as_prompt(prompt)
    files = images_of(folder, output)
    options = {
        "threshold": detector.threshold if threshold is None else threshold,
        "max_detections": max_detections,
        "nms": detector.nms if nms is None else nms,
        "nms_agnostic": detector.nms_agnostic if nms_agnostic is None else nms_agnostic,
    }
    depends = {
        "folder": Path(os.path.relpath(folder.resolve(), output.resolve())).as_posix(),
        "names": prompt.phrases,
        **options,
        **(settings or {}),
    }
    failed: list[tuple[str, str]] = []
    with Journal(output, depends, restart) as journal:
        lowest, options["threshold"] = options["threshold"], journal.settings["threshold"]
        left = {
            name: file
            for name, file in files.items()
            if journal.results.get(name, {}).get("bytes") != _length(file)
        }
        bar = tqdm(
            total=len(files),
            initial=len(files) - len(left),
            unit="image",
            disable=not progress,
            file=sys.stderr,
        )
        with bar:
            for result in _looked_at(left, detector, prompt, [*options.values()], workers):
                bar.update()
                if isinstance(result["error"], Exception):
                    failed.append((result["name"], " ".join(str(result["error"]).split())))
                    with tqdm.external_write_mode(sys.stderr):
                        print(f"error: {failed[-1][1]}", file=sys.stderr)
                else:
                    del result["error"]
                    journal.add(result)
        bad = {name for name, _ in failed}
        # The file as this run calls it: the folder may have moved, with its output.
        results = [
            _with_detections(journal.results[name], lowest)
            | {"file": str(file), "prompt": prompt.phrases}
            for name, file in files.items()
            if name in journal.results and name not in bad
        ]
    names = list(dict.fromkeys(prompt.phrases))
    labels = Labels(names, results, len(left) - len(failed), failed)
    write_text(output / PREDICTIONS, json.dumps(results, indent=1) + "\n")
    labels.files = [write_labels(results, output, kind) for kind in formats]
    return labels


def images_of(folder: Path, output: Path) -> dict[str, Path]:
    """{path in the folder: file}, in order; none that is hidden or of `output`.

    Raises FileNotFoundError, NotADirectoryError, ValueError.
    """
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"{folder} is a file: name the folder that its images are in")
        raise FileNotFoundError(f"the folder {folder} does not exist")
    own, root = output.resolve(), folder.resolve()
    if own == root:
        raise ValueError(f"{output} is the folder of the images: choose another one for the labels")
    inside = own.is_relative_to(root)  # where labels lie among the images, with copies of these
    found = {
        file.relative_to(folder).as_posix(): file
        for file in files_under(folder)
        if is_picture(file) and not (inside and file.resolve().is_relative_to(own))
    }
    if not found:
        raise FileNotFoundError(f"{folder} contains no image, nor do the folders in it")
    return found


def _looked_at(
    files: dict[str, Path], detector: Detector, prompt: Prompt, options: list, workers: int
) -> Iterator[dict]:
    """Results of all images, in order; "error" is why there is none, or None."""
    loaded = load_ahead(files, lambda name: _load(files[name]), workers, detector.batch_size)
    while batch := list(islice(loaded, detector.batch_size)):
        good = [image for _, image in batch if isinstance(image, np.ndarray)]
        found = iter(detect_each(detector, good, [prompt] * len(good), *options) if good else ())
        for name, image in batch:
            outcome = next(found) if isinstance(image, np.ndarray) else image
            result = {"name": name, "error": outcome}
            if not isinstance(outcome, Exception):
                result = {
                    "name": name,
                    "error": None,
                    "bytes": _length(files[name]),
                    "width": image.shape[1],
                    "height": image.shape[0],
                    "detections": detection_records(outcome),
                }
            elif isinstance(image, np.ndarray):  # the error of a file names it
                result["error"] = ValueError(f"{files[name]}: {outcome}")
            yield result


def _with_detections(result: dict, lowest: float) -> dict:
    return result | {"detections": [d for d in result["detections"] if d["score"] >= lowest]}


def load_ahead(
    names: Sequence[str] | dict, load: Callable[[str], Any], workers: int, ahead: int = 0
) -> Iterator[tuple[str, Any]]:
    """(name, load(name)) in order; `workers` threads are at work on the next ones, and no more than
    `workers + ahead` results wait."""
    waiting: deque = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for name in names:
            waiting.append((name, pool.submit(load, name)))
            if len(waiting) >= workers + ahead:
                first, result = waiting.popleft()
                yield first, result.result()
        for name, result in waiting:
            yield name, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _load(file: Path) -> np.ndarray | Exception:
    try:
        return load_image(file)
    except (ValueError, OSError) as error:
        return error


def _length(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a broken link: whoever reads it says so
        return -1
