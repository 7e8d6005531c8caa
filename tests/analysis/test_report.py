"""The report as files, as HTML, and in a real browser."""

import csv

import numpy as np
import pytest
from dynamic_dino.analysis.figure import ReportFigure, Section, plot, slug
from dynamic_dino.analysis.report import write_report
from helpers.pages import check_in_browser, check_page
from PIL import Image


@pytest.fixture
def sections(rng):
    figure, axes = plot()
    axes[0, 0].plot(rng.random(5))
    picture = rng.integers(0, 255, (300, 1100, 3), dtype=np.uint8)
    wide = [[f"<b>& {i}", i / 7, True, None, float("nan"), *range(30)] for i in range(60)]
    head = ["name", "float", "bool", "none", "nan", *(f"column {i}" for i in range(30))]
    return [
        Section(
            "Of <one> & all",
            "Text with <tags>",
            [ReportFigure("a-plot", "A plot", "Look.", head, wide, figure)],
        ),
        Section(
            "Pictures",
            figures=[
                ReportFigure("a-picture", 'A "picture"', "Look.", ["x"], [[1]], picture, shown=0),
                ReportFigure("a-table", "A table", "Read & learn <it>.", head, wide),
            ],
        ),
    ]


def test_files(sections, tmp_path):
    write_report(tmp_path / "new", "Title", "Text", sections)
    names = {"report.html", "a-plot.png", "a-plot.csv", "a-picture.png", "a-picture.csv"}
    assert {file.name for file in (tmp_path / "new").iterdir()} == names | {"a-table.csv"}
    with (tmp_path / "new/a-table.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    figure = sections[1].figures[1]
    assert rows[0] == figure.head and len(rows) == 61
    assert rows[3] == ["<b>& 2", str(2 / 7), "True", "", "nan", *map(str, range(30))]
    picture = np.asarray(Image.open(tmp_path / "new/a-picture.png"))
    np.testing.assert_array_equal(picture, sections[1].figures[0].image)
    sections[0].figures[0].name = "a-table"
    with pytest.raises(ValueError, match="two figures are called a-table"):
        write_report(tmp_path, "Title", "Text", sections)


def test_page(sections, tmp_path):
    file = write_report(tmp_path, "Title & <more>", "Text", sections)
    page = check_page(file.read_text())
    assert page.images == ["A plot", 'A "picture"']
    assert {"of-one-all", "pictures", "a-plot", "a-table", "a-picture"} <= set(page.ids)
    check_in_browser(file, page.images)


def test_slug():
    assert slug("run 0", "stamps_val", "load") == "run-0_stamps_val_load"
    assert slug("", "load") == "load" and slug("AP of x16!") == "ap-of-x16"
