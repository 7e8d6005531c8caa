"""Writing a data set as shards: few large files of images, and annotations that say where in them
each image is (`stored`).

A shard is a ZIP file without compression, so that any tool opens it. Which images lie in which
shard follows from their order and sizes: a run that was interrupted goes on with the next shard.
"""

from __future__ import annotations

import copy
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import written_whole
from ..remote import address
from .convert import write_coco, write_mdetr
from .datasets import describe, get_metadata, load_file, locate_dataset
from .records import Texts
from .stored import name_in_shard, stored_bytes
from .whereabouts import why_missing

SHARD_MB = 256
HEADER = 30  # bytes before the name of a file in a ZIP file


def write_shards(
    source: str, folder: Path, image_folder: Path | None = None, shard_mb: float = SHARD_MB
) -> dict[str, Any]:
    """Writes images-00000.zip, ... and then annotations.json, COCO or MDETR JSON, into `folder`,
    which is the name of the data set from then on; it may be moved as a whole, and copied to where
    it has an address. Images are copied as they are, once where several captions share one.

    Returns counts: "images", "shards", those of them that were "there" already, and "source", a
    line that says what the source is.

    Raises ValueError for a data set without images, and what reading it raises.
    """
    if address(folder):
        raise ValueError(f"{address(folder)} is an address: write to a local folder and copy it")
    place = locate_dataset(source, image_folder)
    records = load_file(place)
    metadata = get_metadata(place.name)
    if not len(records):
        raise ValueError(f"{source} has no images: there is nothing to write")
    root, names = records.image_root, list(dict.fromkeys(records.names))
    renamed: dict[str, str] = {}
    shards = there = 0
    bar = tqdm(total=len(names), desc=folder.name, unit="images", delay=1, disable=None)
    for number, group in enumerate(_groups(root, names, shard_mb * 1e6)):
        shard = folder / f"images-{number:05}.zip"
        members = [(f"{i:05}-{_member(name)}", size) for i, (name, size) in enumerate(group)]
        if _is_whole(shard, members):
            there += 1
        else:
            _write(shard, [os.path.join(root, name) for name, _ in group], members)
        with zipfile.ZipFile(shard) as file:
            for (name, _), info in zip(group, file.infolist(), strict=True):
                start = info.header_offset + HEADER + len(info.orig_filename.encode())
                renamed[name] = name_in_shard(shard.name, info.filename, start, info.file_size)
        shards += 1
        bar.update(len(group))
    bar.close()
    line = describe(place, records)
    records = copy.copy(records)
    records.names = Texts.of(renamed[name] for name in records.names)
    records.image_root = str(folder)
    grounding = records.extra is not None and any("caption" in record for record in records[:1])
    target = folder / "annotations.json"
    with written_whole(target) as file:
        if grounding:
            write_mdetr(file, records, target.name)
        else:
            write_coco(file, records, metadata, target.name)
    return {"images": len(names), "shards": shards, "there": there, "source": line}


def _groups(root: str, names: list[str], most: float) -> Iterator[list[tuple[str, int]]]:
    """(name, size in bytes) of the images of each shard, which has `most` bytes or one image."""
    group: list[tuple[str, int]] = []
    total = 0
    for name in names:
        path = os.path.join(root, name)
        size = os.path.getsize(path) if os.path.exists(path) else len(_content(path))
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append((name, size))
        total += size
    yield group


def _content(path: str) -> bytes:
    if os.path.exists(path):
        return Path(path).read_bytes()
    content = stored_bytes(path)
    if content is None:
        raise FileNotFoundError(why_missing(path))
    return content


def _member(name: str) -> str:
    """The name in the shard, which is there for people."""
    return name.replace("\\", "/").rpartition("/")[2].replace("#", "_")[-100:]


def _write(shard: Path, paths: list[str], members: list[tuple[str, int]]) -> None:
    with written_whole(shard, binary=True, needed=sum(size for _, size in members)) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for path, (name, size) in zip(paths, members, strict=True):
                content = _content(path)
                if len(content) != size:
                    raise ValueError(f"image {path} changes while it is read: begin again later")
                # of 1980, so that the same images make the same shard
                archive.writestr(zipfile.ZipInfo(name), content)


def _is_whole(shard: Path, members: list[tuple[str, int]]) -> bool:
    """Shards appear whole: one that has these images was written before."""
    if not shard.is_file():
        return False
    try:
        with zipfile.ZipFile(shard) as file:
            return [(info.filename, info.file_size) for info in file.infolist()] == members
    except zipfile.BadZipFile:
        return False
