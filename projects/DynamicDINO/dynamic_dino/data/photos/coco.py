"""The COCO photos of the mixture: from the user's COCO 2017, or one by one from its own server.

Boxes come from the official instances_train2017.json and instances_val2017.json. Photos are scaled,
and their boxes with them.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from ...files import write_text, written_whole
from ..json_stream import stream_json
from .scaling import scaled_size, write_scaled
from .sets import PhotosError, coco_file_name

SERVER = "http://images.cocodataset.org"  # COCO's own; its certificate is of another name
ANNOTATIONS = f"{SERVER}/annotations/annotations_trainval2017.zip"
SPLITS_2017 = ("train2017", "val2017")
TRIES = 3
AT_ONCE = 8

Fetch = Callable[[str], bytes]


def fetch(url: str) -> bytes:
    """What stands at the address; raises OSError if it can't be had in `TRIES` tries."""
    for left in reversed(range(TRIES)):
        try:
            with closing(urllib.request.urlopen(url, timeout=30)) as answer:
                return answer.read()
        except OSError as error:
            if not left or (isinstance(error, urllib.error.HTTPError) and error.code == 404):
                raise
    raise AssertionError


def build_coco(
    root: Path,
    ids: dict[str, list[int]],
    *,
    get: Fetch = fetch,
    download_annotations: Callable[[Path], None] | None = None,
    progress: bool = True,
) -> None:
    """Writes photos/coco under `root`: the photos of `ids`, by split, then train.json and val.json.

    Photos are taken from coco/{train,val}2017 where they lie there, else fetched; what an earlier,
    interrupted run wrote is kept. Nothing else of COCO is changed.

    Raises `PhotosError` saying what to download where it can't be reached, or what is wrong.
    """
    folder = root / "photos/coco"
    wanted = {i for split in ids.values() for i in split}
    files = [root / f"coco/annotations/instances_{split}.json" for split in SPLITS_2017]
    if not any(file.is_file() for file in files):
        (download_annotations or fetch_annotations)(root / "coco/annotations")
    images, boxes, categories = official(files, wanted, progress)
    _write_photos(root, folder / "images", images, get, progress)
    for split, members in ids.items():
        document = _document([images[i] for i in members], boxes, categories)
        write_text(folder / f"{split}.json", json.dumps(document))


def official(
    files: Sequence[Path], wanted: set[int], progress: bool = True
) -> tuple[dict[int, dict], dict[int, list[dict]], list[dict]]:
    """Of the wanted ids: images by id with their "split", boxes by image, and COCO's categories.

    files  the annotations of each of `SPLITS_2017`, which need not all exist

    Raises `PhotosError` if an id is in none of the files that are there.
    """
    images: dict[int, dict] = {}
    boxes: dict[int, list[dict]] = {i: [] for i in wanted}
    categories: list[dict] = []
    there = [file for file in files if file.is_file()]
    for split, file in zip(SPLITS_2017, files, strict=True):
        if not file.is_file():
            continue
        categories = []
        lists = ("images", "annotations", "categories")
        for section, _, item in stream_json(file, lists, progress=progress):
            if section == "images" and item["id"] in wanted:
                images[item["id"]] = item | {"split": split}
            elif section == "annotations" and item["image_id"] in wanted:
                boxes[item["image_id"]].append(item)
            elif section == "categories":
                categories.append({"id": item["id"], "name": item["name"]})
    if lost := wanted - images.keys():
        absent = [str(file) for file in files if not file.is_file()]
        raise PhotosError(
            f"{len(lost)} of {len(wanted)} COCO ids, the first {min(lost)}, are not in "
            f"{', '.join(map(str, there))}: "
            + (f"{absent[0]} is needed too" if absent else "these are not COCO 2017's whole files")
            + f"; it is in {ANNOTATIONS}"
        )
    return images, boxes, categories


def fetch_annotations(folder: Path) -> None:
    """COCO's archive of annotations, of which the two files of boxes are kept. An interrupted
    download goes on where it stopped."""
    archive = folder / "annotations_trainval2017.zip"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not archive.is_file():
            _download(ANNOTATIONS, archive)
        with zipfile.ZipFile(archive) as content:
            for split in SPLITS_2017:
                name = f"instances_{split}.json"
                with written_whole(folder / name, binary=True) as file:
                    file.write(content.read(f"annotations/{name}"))
    except zipfile.BadZipFile as error:
        raise PhotosError(f"{archive} is damaged ({error}): remove it and start again") from error
    except OSError as error:
        raise PhotosError(
            f"COCO's boxes can't be fetched ({error}). Where there is internet, download\n"
            f"  {ANNOTATIONS}\n"
            f"and unpack instances_train2017.json and instances_val2017.json of it into {folder}, "
            "and the photos, if you have them, into train2017/ and val2017/ beside it; or give a "
            "folder that holds the photo sets, --from FOLDER"
        ) from error
    archive.unlink()


def _download(url: str, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    done = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with closing(urllib.request.urlopen(request, timeout=60)) as answer:
        if answer.status != 206:  # the server begins at the beginning
            done = 0
        total = done + int(answer.headers.get("Content-Length", 0))
        bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=target.name)
        with partial.open("ab" if done else "wb") as file, bar:
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if total and partial.stat().st_size < total:
        raise OSError(f"{url} broke off; the same command goes on from there")
    partial.replace(target)


def _write_photos(
    root: Path, folder: Path, images: dict[int, dict], get: Fetch, progress: bool
) -> None:
    """The photos that aren't there yet; all others are tried before one that fails is reported."""
    missing = [i for i in sorted(images) if not (folder / coco_file_name(i)).is_file()]
    failed: dict[int, OSError] = {}

    def write(image_id: int) -> None:
        try:
            content = _content(root, images[image_id], get)
        except OSError as error:
            failed[image_id] = error
            return
        image = images[image_id]
        where = f"{_address(image)}, or its copy in your COCO,"
        photo = folder / coco_file_name(image_id)
        write_scaled(photo, content, image["width"], image["height"], where)

    bar = tqdm(
        total=len(images),
        initial=len(images) - len(missing),
        unit="photo",
        desc="COCO photos",
        disable=not progress,
    )
    with bar, ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for done, _ in enumerate(pool.map(write, missing), start=1):
                bar.update()
                if done >= AT_ONCE and len(failed) >= done:  # not one came
                    raise _unreachable(failed, images, root)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise _unreachable(failed, images, root)


def _content(root: Path, image: dict, get: Fetch) -> bytes:
    file = root / "coco" / image["split"] / coco_file_name(image["id"])
    return file.read_bytes() if file.is_file() else get(_address(image))


def _address(image: dict) -> str:
    return f"{SERVER}/{image['split']}/{coco_file_name(image['id'])}"


def _unreachable(failed: dict[int, OSError], images: dict[int, dict], root: Path) -> PhotosError:
    first = min(failed)
    return PhotosError(
        f"{len(failed)} photos of COCO can't be fetched, the first {_address(images[first])} "
        f"({failed[first]}). The same command goes on from here. Or download train2017.zip and "
        f"val2017.zip from {SERVER}/zips/ where there is internet and unpack them into "
        f"{root / 'coco'}; or give a folder that holds the photo sets, --from FOLDER"
    )


def _document(images: list[dict], boxes: dict[int, list[dict]], categories: list[dict]) -> dict:
    """COCO JSON of the scaled photos; ids are COCO's."""
    entries, annotations = [], []
    for image in images:
        width, height = scaled_size(image["width"], image["height"])
        x, y = width / image["width"], height / image["height"]
        kept = {k: image[k] for k in ("coco_url", "flickr_url", "license") if k in image}
        name = coco_file_name(image["id"])
        entries.append(
            {"id": image["id"], "file_name": name, "width": width, "height": height} | kept
        )
        for box in boxes[image["id"]]:
            left, top, w, h = box["bbox"]
            if w <= 0 or h <= 0:
                continue  # COCO has a few
            annotations.append(
                {
                    "id": box["id"],
                    "image_id": image["id"],
                    "category_id": box["category_id"],
                    "bbox": [round(v, 2) for v in (left * x, top * y, w * x, h * y)],
                    "area": round(box.get("area", w * h) * x * y, 2),
                    "iscrowd": box.get("iscrowd", 0),
                }
            )
    return {"images": entries, "annotations": annotations, "categories": categories}
