"""Pascal VOC: an XML file an image, as labelImg, CVAT, Roboflow and VOC itself write them.

VOC counts pixels from 1 and includes the last one (its development kit, section "Bounding boxes"),
so that a box covers xmin - 1 to xmax; Detectron2's reader does the same. A 0 can't be such a pixel:
a set that has one counts from 0. Nor can a number with a decimal point, which CVAT writes: a file
that has one counts from 0. Nothing is subtracted there.

An XML file belongs to the picture of the same name, else to that of its <filename>, which is often
out of date. Pictures without an XML file were not annotated: they are left out and counted.
Objects marked as difficult are kept. ImageSets/Main/train.txt and the like are parts.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element

from ..problems import DataError
from .collector import Collector
from .recognise import Recognised
from .text import read_lines
from .xml import number, read_xml, text_of

CORNERS = ("xmin", "ymin", "xmax", "ymax")
SETS = ("train", "val", "trainval", "test")


def image_sets(folder: Path) -> dict[str, Path]:
    """Part -> file with the names of its images, of a folder as VOC's own."""
    lists = folder / "ImageSets/Main"
    return {part: lists / f"{part}.txt" for part in SETS if (lists / f"{part}.txt").is_file()}


def read(found: Recognised, into: Collector) -> None:
    list_file = image_sets(found.path).get(into.part or "")
    listed = None if list_file is None else {line.split()[0] for line in read_lines(list_file)}
    boxes: list[tuple[int, str, list[float], bool, str]] = []
    from_one = True
    for part, file in found.files:
        try:
            root = read_xml(file)
            wanted = into.wants(part) if listed is None else file.stem in listed
            image = _add_image(root, file, into) if wanted else None
        except DataError as error:
            into.problem(error, str(file))
            continue
        texts = [box.findtext(c) or "" for box in root.iter("bndbox") for c in CORNERS]
        pixels = not any("." in text for text in texts)
        for i, item in enumerate(root.iter("object")):
            where = f"{file}: object {i + 1}"
            try:
                name = text_of(item, "name")
                into.name(name)
                corners = [number(text_of(item, f"bndbox/{c}"), f"<{c}>") for c in CORNERS]
            except DataError as error:
                into.problem(error, where)
                continue
            from_one &= min(corners[:2]) >= 1
            if image is not None:
                boxes.append((image, name, corners, pixels, where))
    for stem in sorted((listed or set()) - {file.stem for _, file in found.files}):
        what = f"it lists {stem!r}, which has no XML file: add it or remove the line"
        into.report(DataError("missing annotation", what, str(list_file)))
    for image, name, (x1, y1, x2, y2), pixels, where in boxes:
        first = from_one and pixels
        into.box(image, name, (x1 - first, y1 - first, x2, y2), where)
    if boxes:
        first = from_one and any(pixels for *_, pixels, _ in boxes)
        into.notes[f"pixels counted from {int(first)}"] = 1
    into.note_images_without("an XML file")


def _add_image(root: Element, file: Path, into: Collector) -> int:
    if root.tag != "annotation":
        raise DataError("unreadable file", f"its root is <{root.tag}>, not <annotation>")
    named = root.findtext("filename") or ""
    path = into.pictures.of_stem(file) or into.pictures.find([named], file)
    size = None
    if root.find("size") is not None:
        width, height = (text_of(root, f"size/{side}") for side in ("width", "height"))
        size = (width, height) if (width, height) != ("0", "0") else None  # written by some tools
    return into.image(path, str(file), size, named or file.stem)
