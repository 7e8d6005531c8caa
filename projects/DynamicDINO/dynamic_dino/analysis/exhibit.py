"""`Exhibit`: a figure or a table with its numbers, and how it is put into files and into a page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..files import written_whole

WIDTH = 5.6  # inches: letters of a figure can still be read where a phone shows it in full


@dataclass
class Exhibit:
    """Something to look at.

    name     of its files; unique in a report
    reading  how to read it, in a sentence or two
    head, rows  its numbers: a table
    figure   a plot, or a picture (uint8 [H, W, 3]); None: the table is what there is to see
    shown    how many rows of the table the page shows; all are in the CSV file
    """

    name: str
    title: str
    reading: str
    head: Sequence[str]
    rows: Sequence[Sequence]
    figure: Figure | np.ndarray | None = None
    shown: int = 40

    def image(self) -> Image.Image | None:
        """The figure's pixels."""
        if isinstance(self.figure, np.ndarray):
            return Image.fromarray(self.figure)
        if self.figure is None:
            return None
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=160, facecolor="white")
        buffer.seek(0)
        return Image.open(buffer).convert("RGB")

    def write(self, folder: Path) -> list[Path]:
        """NAME.csv, and NAME.png if there is a figure."""
        files = [folder / f"{self.name}.csv"]
        with written_whole(files[0]) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.head)
            writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        if (image := self.image()) is not None:
            files.append(folder / f"{self.name}.png")
            image.save(files[1], optimize=True)
        return files


@dataclass
class Section:
    """A part of a report: what one model did on one data set, or a comparison."""

    title: str
    text: str = ""
    exhibits: list[Exhibit] = field(default_factory=list)


def slug(*words: str) -> str:
    """A file's name of words: "run 0", "stamps_val" -> "run-0_stamps-val"."""
    return "_".join(re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") for word in words if word)


def plot(rows: int = 1, columns: int = 1, height: float = 2.6) -> tuple[Figure, np.ndarray]:
    """A figure of `WIDTH`, and its axes [rows, columns], each `height` inches high."""
    figure = Figure(figsize=(WIDTH, height * rows + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
