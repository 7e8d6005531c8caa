"""`ReportFigure`: a figure or table of the report, as files and as a part of its page."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..files import written_whole

WIDTH = 5.6  # inches: letters of a figure can still be read where a phone shows it in full


@dataclass
class ReportFigure:
    """A figure or a table of the report, with its numbers.

    name     of its files; unique in a report
    reading  how to read it, in a sentence or two
    head, rows  its numbers: a table
    image    a plot, or a picture (uint8 [H, W, 3]); None: the table is what there is to see
    shown    how many rows of the table the page shows; all are in the CSV file
    """

    name: str
    title: str
    reading: str
    head: Sequence[str]
    rows: Sequence[Sequence]
    image: Figure | np.ndarray | None = None
    shown: int = 40

    @property
    def is_photo(self) -> bool:
        return isinstance(self.image, np.ndarray)

    @cached_property
    def png(self) -> bytes:
        """The figure as a PNG file, drawn once."""
        buffer = io.BytesIO()
        if self.is_photo:
            Image.fromarray(self.image).save(buffer, "PNG")
            return buffer.getvalue()
        self.image.savefig(buffer, format="png", dpi=160, facecolor="white")
        with Image.open(buffer) as image:
            few = image.convert("RGB").quantize(128)  # a third of the bytes
        buffer = io.BytesIO()
        few.save(buffer, "PNG")
        return buffer.getvalue()

    def inline(self) -> str:
        """The figure as an address that holds it: a plot as PNG, a photo as JPEG."""
        kind, content = "png", self.png
        if self.is_photo:
            buffer = io.BytesIO()
            Image.fromarray(self.image).save(buffer, "JPEG", quality=82, optimize=True)
            kind, content = "jpeg", buffer.getvalue()
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

    def write(self, folder: Path) -> None:
        """NAME.csv, and NAME.png if there is a figure."""
        with written_whole(folder / f"{self.name}.csv") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.head)
            writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        if self.image is not None:
            (folder / f"{self.name}.png").write_bytes(self.png)


@dataclass
class Section:
    """A part of a report: what one model did on one data set, or a comparison."""

    title: str
    text: str = ""
    figures: list[ReportFigure] = field(default_factory=list)


def slug(*words: str) -> str:
    """A file's name of words: "run 0", "stamps_val" -> "run-0_stamps_val"; a slug stays."""
    parts = "_".join(word for word in words if word).lower().split("_")
    return "_".join(re.sub(r"[^a-z0-9]+", "-", part).strip("-") for part in parts if part)


def plot(rows: int = 1, columns: int = 1, height: float = 2.6) -> tuple[Figure, np.ndarray]:
    """A figure of `WIDTH`, and its axes [rows, columns], each `height` inches high."""
    figure = Figure(figsize=(WIDTH, height * rows + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
