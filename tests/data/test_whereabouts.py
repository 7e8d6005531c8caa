"""Images are found where they are, whatever machine or tool wrote the annotation file."""

import json
import os
import tempfile
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from dynamic_dino.data.check import check_dataset
from dynamic_dino.data.convert import convert_dataset
from dynamic_dino.data.datasets import load_datasets, load_own_data
from dynamic_dino.data.image_files import find_images
from dynamic_dino.data.images import as_array, read_image
from dynamic_dino.data.records import Records, Texts
from dynamic_dino.data.whereabouts import find_path, why_missing, with_found_images
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def records_of(names, root):
    count = len(names)
    return Records(
        "somewhere",
        root,
        Texts.of(names),
        np.arange(count),
        np.full((count, 2), 8),
        np.zeros(count + 1, dtype=np.int64),
        np.zeros((0, 4)),
        np.zeros(0),
        np.zeros(0),
    )


words = st.text("abcdefgäя 1-_", min_size=1, max_size=8).map(str.strip).filter(bool)
folders = st.lists(words, max_size=2).map("/".join)
# How a path "sub/photo.jpg" below the images' folder is written elsewhere.
WRITTEN = {
    "as it is": lambda path: path,
    "on Windows": lambda path: path.replace("/", "\\"),
    "above, on Windows": lambda path: "..\\..\\media\\" + path.replace("/", "\\"),
    "with a drive": lambda path: "C:\\Users\\me\\" + path.replace("/", "\\"),
    "of another machine": lambda path: f"/home/somebody/data/{path}",
    "by a server": lambda path: f"https://example.org/media/{quote(path)}?size=large",
    "with its folder": lambda path: f"images/{path}",
    "from the annotations": lambda path: f"../images/{path}",
}
# The folder that the names are relative to, where the images are in DATA/images.
ROOTS = ("images", "", "annotations")


@settings(max_examples=examples(40), deadline=None)
@given(
    written=st.sampled_from(sorted(WRITTEN)),
    root=st.sampled_from(ROOTS),
    files=st.dictionaries(folders, st.sets(words, min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_files_are_found_however_their_paths_are_written(written, root, files):
    with tempfile.TemporaryDirectory() as folder:
        look(Path(folder), written, root, files)


def look(base, written, root, files):
    (base / "annotations").mkdir()
    paths = [os.path.join(folder, f"{n}.jpg") for folder, names in files.items() for n in names]
    for path in paths:
        (base / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (base / "images" / path).touch()
    records = records_of([WRITTEN[written](path) for path in paths], base / root)
    found, notes = with_found_images(records)
    assert [os.path.realpath(record["file_name"]) for record in found] == [
        os.path.realpath(base / "images" / path) for path in paths
    ]
    untouched = all(os.path.isfile(record["file_name"]) for record in records)
    assert bool(notes) != untouched
    assert with_found_images(found) == (found, []), "found is found"


def test_two_names_never_become_one_file(tmp_path):
    (tmp_path / "1.jpg").touch()
    records = records_of(["C:\\train\\1.jpg", "C:\\val\\1.jpg"], tmp_path)
    assert with_found_images(records) == (records, [])
    assert with_found_images(records_of(["a.jpg"], tmp_path / "nowhere"))[1] == []


def test_a_folder_that_is_there_stays_though_a_file_of_it_is_missing(tmp_path):
    (tmp_path / "images").mkdir()
    for file in ("b.jpg", "images/a.jpg"):
        (tmp_path / file).touch()
    for names in (["a.jpg", "b.jpg"], ["b.jpg", "a.jpg"]):
        records = records_of(names, tmp_path)
        assert with_found_images(records) == (records, [])


@pytest.mark.parametrize(
    "name, words",
    [
        ("D:\\photos\\a.jpg", "path of Windows"),
        ("..\\photos\\a.jpg", "path of Windows"),
        ("https://example.org/a.jpg", "an address: download"),
        ("train/a.jpg", "there is no folder .*/train"),
        ("/home/nobody-here/a.jpg", "there is no folder /home/nobody-here"),
        ("B.jpg", "there is .*/b.JPEG"),
    ],
)
def test_a_missing_image_has_its_reason_and_a_remedy_that_exists(tmp_path, name, words):
    (tmp_path / "b.JPEG").touch()
    message = why_missing(os.path.join(tmp_path, name))
    with pytest.raises(FileNotFoundError, match=f"{words}.*--image-folder.*data.train_images"):
        raise FileNotFoundError(message)


@pytest.mark.parametrize("name", ["data:image/png;base64," + "iVBOR/" * 900, "a\0.jpg", "x" * 999])
def test_names_that_no_file_can_have(tmp_path, name):
    records = records_of([name], tmp_path)
    assert with_found_images(records) == (records, [])
    for look in (
        lambda: read_image(records[0]),
        lambda: as_array(name),
        lambda: find_images([name]),
    ):
        with pytest.raises(FileNotFoundError) as error:
            look()
        assert len(str(error.value)) < 600


def coco(file, names, size=(8, 6)):
    images = [
        {"id": i, "file_name": name, "width": size[0], "height": size[1]}
        for i, name in enumerate(names)
    ]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 3, 2]} for i in range(9)]
    categories = [{"id": 1, "name": "mug"}]
    file.parent.mkdir(exist_ok=True)
    content = {"images": images, "annotations": boxes[: len(names)], "categories": categories}
    file.write_text(json.dumps(content))
    return str(file)


def test_the_layout_of_cvat_and_paths_of_windows(tmp_path, rng):
    """annotations/instances_default.json beside images/, and a file that Windows wrote."""
    (tmp_path / "images").mkdir()
    for i in range(2):
        pixels = rng.integers(0, 65536, (6, 8)).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    cvat = coco(tmp_path / "annotations/instances_default.json", ["0.png", "1.png"])
    windows = coco(tmp_path / "windows.json", ["..\\images\\0.png", "..\\images\\1.png"])
    for file in (cvat, windows):
        result = check_dataset(file)
        assert result.ok and result.counts == {"image found elsewhere": 1}, list(result.lines())
        for records in (load_datasets(file), load_own_data(file, tmp_path / "images")[0]):
            assert [read_image(record).shape for record in records] == [(6, 8, 3)] * 2
    lost = check_dataset(coco(tmp_path / "annotations/lost.json", ["x\\2.png"]))
    assert lost.counts == {"missing image": 1} and "path of Windows" in "\n".join(lost.lines())


@pytest.mark.parametrize("turn, words", [(6, "swapped: .*EXIF.*orientation 6"), (1, "swapped")])
def test_swapped_sizes_are_called_so(tmp_path, turn, words):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=exif)
    size = (8, 6) if turn == 6 else (6, 8)
    [problem] = check_dataset(coco(Path(tmp_path) / "a.json", ["a.jpg"], size)).examples[
        "bad image"
    ]
    with pytest.raises(ValueError, match=words + ".*--sizes-of-images"):
        raise ValueError(problem)
    fixed = tmp_path / "fixed.json"
    convert_dataset(str(tmp_path / "a.json"), fixed, "coco", sizes_of_images=True)
    assert check_dataset(str(fixed)).ok


def test_find_path_prefers_the_longest_end(tmp_path):
    for folder in ("val", "images/train", "images/val"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.jpg").touch()
    assert find_path("C:\\x\\val\\1.jpg", tmp_path) == tmp_path / "val/1.jpg"
    assert find_path("C:\\x\\train\\1.jpg", tmp_path) == tmp_path / "images/train/1.jpg"
    assert find_path("test/1.jpg", tmp_path) is None
