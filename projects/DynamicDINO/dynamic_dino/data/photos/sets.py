"""What the photo sets are, whether one is whole, and how it gets to its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tqdm import tqdm

from ...files import written_whole
from ..builtin import BUILTIN, PHOTO_SETS
from ..coco_json import load_coco_json
from ..records import Records

SPLITS = ("train", "val")
NAMES = tuple(PHOTO_SETS)


class PhotosError(RuntimeError):
    """Photos that can't be had or aren't what they should be; the message says what to do."""


@cache
def coco_ids() -> dict[str, list[int]]:
    """The COCO 2017 ids of each split, ascending."""
    return json.loads(Path(__file__).with_name("coco_ids.json").read_text())


def coco_file_name(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def verify(name: str, folder: Path) -> dict[str, Records]:
    """The records of both splits of set `name` that `folder` holds.

    Raises `PhotosError` if a file is missing, the numbers of images or boxes are others than those
    of `BUILTIN`, the splits share a picture, or, of coco, the pictures aren't those of the ids.
    """
    found = {}
    for split in SPLITS:
        try:
            found[split] = load_coco_json(folder / f"{split}.json", folder / "images")
        except (FileNotFoundError, ValueError) as error:
            raise PhotosError(f"{error}\n{layout(name)}") from error
    files = {split: [r["file_name"] for r in records] for split, records in found.items()}
    lost = [file for split in SPLITS for file in files[split] if not Path(file).is_file()]
    if lost:
        raise PhotosError(f"{lost[0]} and {len(lost) - 1} more pictures of {name} are not there")
    if both := {*files["train"]} & {*files["val"]}:
        raise PhotosError(f"{folder}: {min(both)} is in train.json and in val.json")
    for split, records in found.items():
        _check_numbers(name, split, folder, records)
        if name == "coco":
            wanted = {coco_file_name(i) for i in coco_ids()[split]}
            if wrong := wanted ^ {Path(file).name for file in files[split]}:
                raise PhotosError(
                    f"{folder / split}.json: {min(wrong)} and {len(wrong) - 1} more pictures are "
                    "missing or too many; they must be those of COCO's ids that the package lists"
                )
    return found


def _check_numbers(name: str, split: str, folder: Path, records: Records) -> None:
    entry = BUILTIN[f"photos_{name}_{split}"]
    for what, number, wanted in (
        ("images", len(records), entry.images),
        ("boxes", len(records.boxes), entry.boxes),
    ):
        if wanted is not None and number != wanted:
            raise PhotosError(
                f"{folder / split}.json has {number:,} {what}, {name} has {wanted:,}: it is "
                "incomplete or another version"
            )


def is_there(folder: Path) -> bool:
    """Whether there are annotations; they are written last."""
    return all((folder / f"{split}.json").is_file() for split in SPLITS)


def layout(name: str) -> str:
    """What to download for a set that isn't there, and where to put it."""
    page, licence = PHOTO_SETS[name].page, PHOTO_SETS[name].licence
    counts = {split: BUILTIN[f"photos_{name}_{split}"].images for split in SPLITS}
    return (
        f"  from   {page} ({licence})\n"
        f"  to     photos/{name}/train.json ({counts['train']:,} images), "
        f"photos/{name}/val.json ({counts['val']:,}), both COCO JSON, and photos/{name}/images/"
    )


def place(name: str, source: Path, target: Path, copy: bool, progress: bool = True) -> None:
    """Links `target`, which is not there or not whole, to the set in `source`, or copies it there:
    pictures first, each one whole, annotations last. A copy that was interrupted goes on.

    Raises `PhotosError` if something else is in the way or links can't be made.
    """
    if target.is_symlink() or (target.exists() and not copy):
        raise PhotosError(f"{target} exists and is not whole: remove it to take {source}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        try:
            target.symlink_to(source.resolve(), target_is_directory=True)
        except OSError as error:
            raise PhotosError(f"can't link {target} ({error.strerror}): use --copy") from error
        return
    files = sorted(file for file in (source / "images").rglob("*") if file.is_file())
    files += [source / f"{split}.json" for split in SPLITS]
    for file in tqdm(files, unit="file", desc=f"copying {name}", disable=not progress):
        to = target / file.relative_to(source)
        if to.is_file() and to.stat().st_size == file.stat().st_size:
            continue
        with file.open("rb") as content, written_whole(to, binary=True) as out:
            shutil.copyfileobj(content, out)


def numbers(found: Mapping[str, Records]) -> str:
    """One line for people."""
    parts = [f"{s} {len(r):,} images {len(r.boxes):,} boxes" for s, r in found.items()]
    return ", ".join(parts)
