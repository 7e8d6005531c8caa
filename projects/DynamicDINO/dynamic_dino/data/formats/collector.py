"""What a reader of these formats hands over: images with their boxes and names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..boxes import read_box, read_size
from ..catalog import replace_metadata
from ..coco_json import without_boxes
from ..columns import Columns
from ..fields import read_name
from ..image_files import unread_remedy
from ..problems import DataError, Reporter
from ..records import Records
from ..whereabouts import why_missing
from .pictures import Pictures, picture_size


class Collector:
    """Images and boxes of one part of a data set, with the names of all its parts.

    Args:
        source: what was named, a file or a folder.
        part: "train", "val" or "test", of which images are kept; None: all.
    """

    def __init__(
        self, source: Path, pictures: Pictures, part: str | None, report: Reporter
    ) -> None:
        self.source, self.pictures, self.part, self.report = source, pictures, part, report
        self.columns = Columns()
        self.notes: Counter[str] = Counter()  # what was left out or assumed, said with a number
        self._names: dict[str, int] = {}
        self._places: list[str] = []
        self._annotated: dict[str, str] = {}  # image -> where it was annotated

    def problem(self, error: DataError, where: str) -> None:
        """Reports what is wrong there, unless the error knows its place better."""
        self.report(error if error.where else error.at(where))

    def wants(self, part: str | None) -> bool:
        return self.part is None or part == self.part

    def name(self, name: Any) -> int:
        """Makes a name known, also one without boxes. Raises DataError if it is none."""
        known = read_name(name, "name").strip()
        return self._names.setdefault(known, len(self._names))

    def image(
        self,
        path: Path | None,
        where: str,
        size: tuple[Any, Any] | None = None,
        sought: str = "",
    ) -> int:
        """Adds an image; returns its index.

        Args:
            path: its file; None: it was not found.
            where: the place of its annotation.
            size: (width, height) as the annotation states it; None: that of the file.
            sought: the name that it was looked for by.

        Raises DataError.
        """
        if path is None:
            raise DataError("missing image", why_missing(sought, self.pictures.root))
        name = self.pictures.relative(path)
        if name in self._annotated:
            what = f"image {name} is annotated twice, also in {self._annotated[name]}: remove one"
            raise DataError("duplicate image", what)
        self._annotated[name] = where
        if size is not None:
            size = read_size({"width": size[0], "height": size[1]}, name)
        return self.columns.add_image(name, len(self._annotated), size or picture_size(path))

    def size_of(self, image: int) -> tuple[int, int]:
        return self.columns.sizes[image]

    def box(self, image: int, name: Any, corners: Sequence[Any], where: str) -> None:
        """Adds a box (x1, y1, x2, y2) in pixels; what is wrong with it is reported."""
        try:
            key, box = self.name(name), read_box(corners, "xyxy")
        except DataError as error:
            self.problem(error, where)
            return
        self.columns.add_annotation(image, key, len(self._places), box)
        self._places.append(where)

    def hull(self, image: int, name: Any, points: Any, where: str) -> None:
        """Adds the box around points [[x, y], ...] in pixels."""
        try:
            xy = np.asarray(points, dtype=float).reshape(-1, 2)
            corners = [*xy.min(axis=0).tolist(), *xy.max(axis=0).tolist()]
        except (TypeError, ValueError):
            what = f"points {str(points)[:60]} are not pairs of numbers: correct or remove them"
            self.report(DataError("malformed box", what, where))
            return
        self.box(image, name, corners, where)

    def note_images_without(self, what: str) -> None:
        """Counts the images that nothing annotates; only of a whole data set, where it is known."""
        bare = len(self.pictures.all) - len(self._annotated)
        if self.part is None and bare > 0:
            self.notes[f"left out {{n}} images without {what}"] = bare

    def _note_unread(self) -> None:
        pictures = self.pictures
        left = [path for path in pictures.unread if pictures.relative(path) not in self._annotated]
        if left:
            what = f"images that aren't read ({left[0].name}, ...: {unread_remedy(left[0])})"
            self.notes[f"left out {{n}} {what}"] = len(left)

    def records(self, dataset_name: str, kind: str, keep_order: bool = False) -> Records:
        """Checks the boxes; sets the metadata of the data set. Names are sorted, unless the format
        gives them an order; their category ids count from 1."""
        columns = self.columns
        columns.close()
        names = list(self._names) if keep_order else sorted(self._names)
        class_of = np.array([names.index(name) for name in self._names], dtype=np.int64)

        def where(i: int) -> str:
            return f"{self._places[columns.number[i]]}, image {columns.names[columns.image[i]]!r}"

        columns.fit(self.source, "xyxy", self.report, where)
        self._note_unread()
        notes = [text.replace("{n}", f"{count:,}") for text, count in self.notes.items()]
        classes = class_of[columns.key]
        replace_metadata(
            dataset_name,
            thing_classes=names,
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(names))},
            image_root=str(self.pictures.root),
            evaluator_type="coco",
            kind=kind,
            notes=notes,
            without_boxes=without_boxes(len(names), classes),
        )
        return columns.records(dataset_name, self.pictures.root, classes)
