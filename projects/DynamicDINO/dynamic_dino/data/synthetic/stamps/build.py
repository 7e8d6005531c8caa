"""Writes the data set, images and COCO JSON, by several processes; an interrupted run goes on.

Images are composed in chunks inside ``<root>/stamps/.building``; a chunk counts as done when its
JSON lies beside its images. When all are done the folders move to their place and
``manifest.json``, written last, records the settings: the same settings again find it and do
nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
from tqdm import tqdm

from ....files import write_text
from .compose import SplitRecipe, compose, split_recipes
from .library import Library
from .vocabulary import Vocabulary

CHUNK = 100  # images
FORMAT = 1  # raise when the same settings give other images
RARE, FREQUENT = 1 / 3, 2 / 3  # ranks of the seen phrases by number of training images


@dataclass(frozen=True)
class Settings:
    """What decides the content of the data set. ``inputs`` stands for the committed JSON files."""

    seed: int = 0
    train: int = 10000
    val: int = 500
    val_novel: int = 300
    format: int = FORMAT
    inputs: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": self.train, "val": self.val, "val_novel": self.val_novel}


@dataclass(frozen=True)
class _Job:
    split: str
    start: int
    stop: int


def is_complete(folder: Path, settings: Settings) -> bool:
    """True if ``folder`` holds the data set with exactly these settings."""
    manifest = folder / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text())["settings"] == asdict(settings)


def build(
    folder: Path,
    library: Library,
    vocabulary: Vocabulary,
    settings: Settings,
    workers: int,
    val_real: dict | None = None,
    photos: dict[str, bytes] | None = None,
    progress: bool = True,
) -> dict:
    """Compose everything into ``folder`` (``<root>/stamps``) and return the manifest.

    val_real  COCO dictionary of hand-made boxes; its categories are matched by name
    photos    its photos, file name -> content

    The result depends on the library, the vocabulary and the settings, not on ``workers``, and not
    on whether the run was interrupted.
    """
    building = folder / ".building"
    _discard_other_settings(building, settings)
    recipes = split_recipes(vocabulary, settings.seed)
    parts = _compose_all(building, library, vocabulary, recipes, settings, workers, progress)
    extra = [category["name"] for category in val_real["categories"]] if val_real else []
    categories = make_categories(vocabulary, extra, parts["train"])
    documents = {
        split: _coco(parts[split], categories, f"Stamps, composed, split {split}")
        for split in settings.sizes
    }
    if val_real:
        documents["val_real"] = _map_categories(val_real, categories)
        for name, content in (photos or {}).items():
            path = building / "val_real" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (building / "annotations").mkdir(exist_ok=True)
    for split, document in documents.items():
        write_text(building / "annotations" / f"{split}.json", json.dumps(document))
    manifest = {
        "settings": asdict(settings),
        "phrases": {
            "seen": sum(not c["novel"] for c in categories),
            "novel": len(vocabulary.novel),
            "novel, only in val_real": sum(c["novel"] for c in categories) - len(vocabulary.novel),
            **{
                name: sum(c["frequency"] == name for c in categories if not c["novel"])
                for name in "rcf"
            },
        },
        "images": {split: len(document["images"]) for split, document in documents.items()},
        "boxes": {split: len(document["annotations"]) for split, document in documents.items()},
        "cutouts": len(library.cutouts),
    }
    _publish(building, folder, documents)
    write_text(folder / "manifest.json", json.dumps(manifest))
    return manifest


def _discard_other_settings(building: Path, settings: Settings) -> None:
    """Keep an unfinished run only if it had the same settings."""
    marker = building / "settings.json"
    if marker.is_file() and json.loads(marker.read_text()) == asdict(settings):
        return
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    write_text(marker, json.dumps(asdict(settings)))


def _compose_all(
    building: Path,
    library: Library,
    vocabulary: Vocabulary,
    recipes: dict[str, SplitRecipe],
    settings: Settings,
    workers: int,
    progress: bool,
) -> dict[str, list[dict]]:
    """Records of every split, in order: {"file_name", "height", "width", "objects"}."""
    jobs = []
    for split, size in settings.sizes.items():
        (building / split).mkdir(parents=True, exist_ok=True)
        jobs += [_Job(split, at, min(at + CHUNK, size)) for at in range(0, size, CHUNK)]
    missing = [job for job in jobs if not _chunk_file(building, job).exists()]
    total = sum(settings.sizes.values())
    done = total - sum(job.stop - job.start for job in missing)
    bar = tqdm(total=total, initial=done, unit="image", desc="composing", disable=not progress)
    state = (building, library, vocabulary, recipes, settings.seed)
    with bar:
        if workers <= 1:
            _worker_state(*state)
            for job in missing:
                bar.update(_run(job))
        else:
            # forked workers share the decoded pictures
            methods = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("fork" if "fork" in methods else None)
            with ProcessPoolExecutor(workers, context, _start_worker, state) as pool:
                try:
                    for chunk in as_completed([pool.submit(_run, job) for job in missing]):
                        bar.update(chunk.result())
                except BaseException:  # don't compose the rest before reporting it
                    pool.shutdown(cancel_futures=True)
                    raise
    parts: dict[str, list[dict]] = {split: [] for split in settings.sizes}
    for job in jobs:
        parts[job.split] += json.loads(_chunk_file(building, job).read_text())
    return parts


_worker: tuple = ()


def _worker_state(*state) -> None:
    global _worker
    _worker = state
    cv2.setNumThreads(0)  # one process per core is enough; and forks don't mix with thread pools


def _start_worker(*state) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    _worker_state(*state)


def _run(job: _Job) -> int:
    building, library, vocabulary, recipes, seed = _worker
    records = []
    for index in range(job.start, job.stop):
        composite = compose(library, vocabulary, recipes[job.split], seed, index)
        name = f"{index:06d}.jpg"
        quality = [cv2.IMWRITE_JPEG_QUALITY, composite.jpeg_quality]
        if not cv2.imwrite(str(building / job.split / name), composite.image, quality):
            raise OSError(f"{building / job.split / name}: could not write the image")
        height, width = composite.image.shape[:2]
        objects = [[p, *box] for p, box in zip(composite.phrases, composite.boxes, strict=True)]
        records.append({"file_name": name, "height": height, "width": width, "objects": objects})
    write_text(_chunk_file(building, job), json.dumps(records))
    return len(records)


def _chunk_file(building: Path, job: _Job) -> Path:
    return building / f"{job.split}-{job.start:06d}.json"


def make_categories(vocabulary: Vocabulary, extra: Iterable[str], train: list[dict]) -> list[dict]:
    """COCO categories (ids from 1), the same for all splits.

    frequency: the seen phrases, ranked by the number of training images they are in, in three equal
    parts: "r", "c", "f". (LVIS cuts at 10 and 100 of 100,000 images, which would call all phrases
    of a set this small frequent.) Novel phrases, also those of ``extra`` that the vocabulary lacks
    (on real photos only), have no training image and no frequency: "rare" means rarely seen.
    """
    images = Counter()
    for record in train:
        images.update({phrase for phrase, *_ in record["objects"]})
    names = [*vocabulary.phrases, *sorted(set(extra) - set(vocabulary.phrases))]
    seen = [name for name in vocabulary.phrases if name not in vocabulary.novel]
    ranked = sorted(seen, key=lambda name: images[name])
    frequency = {
        name: "r" if rank < RARE * len(seen) else "c" if rank < FREQUENT * len(seen) else "f"
        for rank, name in enumerate(ranked)
    }
    ids = {name: number for number, name in enumerate(names, start=1)}
    return [
        {
            "id": ids[name],
            "name": name,
            "frequency": frequency.get(name),
            "novel": name not in frequency,
            "image_count": images[name],
            "near_synonyms": sorted(
                ids[other] for other in vocabulary.synonyms_of(name) if other in ids
            ),
        }
        for name in names
    ]


def _coco(records: list[dict], categories: list[dict], description: str) -> dict:
    ids = {category["name"]: category["id"] for category in categories}
    images, annotations = [], []
    for number, record in enumerate(records, start=1):
        images.append({"id": number, **{k: record[k] for k in ("file_name", "height", "width")}})
        for phrase, x, y, w, h in record["objects"]:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": ids[phrase],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    info = {"description": description}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _map_categories(document: dict, categories: list[dict]) -> dict:
    """The same annotations with the category ids of the composed splits, matched by name."""
    ids = {category["name"]: category["id"] for category in categories}
    names = {category["id"]: category["name"] for category in document["categories"]}
    annotations = [
        {**annotation, "category_id": ids[names[annotation["category_id"]]]}
        for annotation in document["annotations"]
    ]
    return {**document, "annotations": annotations, "categories": categories}


def _publish(building: Path, folder: Path, splits: Iterable[str]) -> None:
    """Move the finished folders to their place; what an earlier run left there goes."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for name in [*splits, "annotations"]:
        shutil.rmtree(folder / name, ignore_errors=True)
        if (building / name).exists():
            (building / name).rename(folder / name)
    shutil.rmtree(building)
