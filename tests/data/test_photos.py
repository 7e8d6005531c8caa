"""The photo sets: their lists of ids, the command that makes them, and what it says where it can't.

All pictures are drawn here; nothing is downloaded but from a server of this machine.
"""

import dataclasses
import json
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from dynamic_dino.data import datasets
from dynamic_dino.data.builtin import BUILTIN, PHOTO_SETS
from dynamic_dino.data.photos import cli, coco, sets
from dynamic_dino.data.photos.cli import main
from dynamic_dino.data.photos.sets import PhotosError
from dynamic_dino.data.photos.voc import voc_ids

IDS = {"train": [9, 25, 30], "val": [139, 285]}
SPLIT_OF = {9: "train2017", 25: "train2017", 30: "train2017", 139: "val2017", 285: "val2017"}
SIZES = {9: (640, 400), 25: (300, 200), 30: (333, 500), 139: (640, 426), 285: (586, 640)}


def jpeg(image_id: int) -> bytes:
    width, height = SIZES[image_id]
    pixels = np.full((height, width, 3), image_id % 256, np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def annotations(split: str) -> dict:
    """One box a photo, from a tenth to a half of its sides; a crowd; an image that isn't asked."""
    ids = [i for i in SIZES if SPLIT_OF[i] == split]
    boxes = [
        {
            "id": 100 + i,
            "image_id": i,
            "category_id": (1, 3)[n % 2],
            "bbox": [w * 0.1, h * 0.1, w * 0.4, h * 0.4],
            "area": w * h * 0.1,
            "iscrowd": 0,
            "segmentation": [[1, 1, 9, 1, 9, 9]],
        }
        for n, i in enumerate(ids)
        for w, h in [SIZES[i]]
    ]
    boxes += [{**boxes[0], "id": 1, "iscrowd": 1}, {**boxes[0], "id": 2, "bbox": [1, 1, 0, 5]}]
    images = [{"id": i, "width": w, "height": h} for i in ids for w, h in [SIZES[i]]]
    images += [{"id": 7, "width": 9, "height": 9}]
    return {
        "images": [{"file_name": f"{i['id']:012d}.jpg", "license": 3, **i} for i in images],
        "annotations": boxes,
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
    }


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data root with COCO's annotations and its val2017; ids and numbers are those of here."""
    for split in ("train2017", "val2017"):
        file = tmp_path / f"coco/annotations/instances_{split}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(annotations(split)))
    (tmp_path / "coco/val2017").mkdir()
    for i in IDS["val"]:
        (tmp_path / f"coco/val2017/{i:012d}.jpg").write_bytes(jpeg(i))
    monkeypatch.setattr(cli, "coco_ids", lambda: IDS)
    monkeypatch.setattr(sets, "coco_ids", lambda: IDS)
    for split in IDS:
        for name in PHOTO_SETS:
            few = dataclasses.replace(
                BUILTIN[f"photos_{name}_{split}"], images=len(IDS[split]), boxes=None
            )
            monkeypatch.setitem(BUILTIN, few.name, few)
    datasets.register_builtin(tmp_path)
    yield tmp_path
    datasets.register_builtin()


@pytest.fixture
def fetched(monkeypatch):
    """The addresses that were asked for, of COCO's server in this process."""
    asked = []

    def get(url: str) -> bytes:
        asked.append(url)
        return jpeg(int(Path(url).stem))

    monkeypatch.setattr(cli, "build_coco", partial(coco.build_coco, get=get, progress=False))
    return asked


def test_the_ids_that_the_package_lists():
    ids = sets.coco_ids()
    assert set(ids) == {"train", "val"}
    for split, members in ids.items():
        assert all(type(i) is int and 0 < i < 600_000 for i in members)
        assert members == sorted(set(members))
        assert len(members) == BUILTIN[f"photos_coco_{split}"].images
    assert not set(ids["train"]) & set(ids["val"])


def test_the_names_of_the_checkouts_that_the_package_lists():
    ids = voc_ids()
    assert set(ids) == {"groceries", "animals25"}
    for name, splits in ids.items():
        keys = {
            split: [f"{folder}/{stem}" for folder, stems in folders.items() for stem in stems]
            for split, folders in splits.items()
        }
        for split, members in keys.items():
            assert len(members) == len(set(members)) == BUILTIN[f"photos_{name}_{split}"].images
            assert all("/" not in stem for stems in splits[split].values() for stem in stems)
        assert not set(keys["train"]) & set(keys["val"])


def test_coco_of_what_lies_there_and_of_its_server(root, fetched, capsys):
    assert main(["--sets", "coco", "--out", str(root)]) == 0
    assert "coco: train 3 images" in capsys.readouterr().out
    # val2017 lies there
    assert {url.partition("cocodataset.org/")[2] for url in fetched} == {
        f"train2017/{i:012d}.jpg" for i in IDS["train"]
    }
    for split, members in IDS.items():
        records = datasets.load_datasets(f"photos_coco_{split}")
        assert [record["image_id"] for record in records] == members
        assert datasets.get_metadata(f"photos_coco_{split}").thing_classes == ["person", "car"]
        for record in records:
            w, h = record["width"], record["height"]
            ow, oh = SIZES[record["image_id"]]
            assert max(w, h) == min(480, max(ow, oh)) and w / h == pytest.approx(ow / oh, rel=0.01)
            assert cv2.imread(record["file_name"]).shape[:2] == (h, w)
            box = record["annotations"][0]["bbox"]
            assert box == pytest.approx([w * 0.1, h * 0.1, w * 0.4, h * 0.4], abs=0.011)
        crowds = [a["iscrowd"] for record in records for a in record["annotations"]]
        assert sum(crowds) == 1 and len(crowds) == len(members) + 1  # not the one without width
    content = json.loads((root / "photos/coco/train.json").read_text())
    scale = 480 / 640
    first = next(a for a in content["annotations"] if a["image_id"] == 9 and not a["iscrowd"])
    assert first["area"] == pytest.approx(640 * 400 * 0.1 * scale**2)

    fetched.clear()
    assert main(["--sets", "coco", "--out", str(root)]) == 0
    assert not fetched, "what is there is left as it is"


def test_an_interrupted_run_goes_on(root, monkeypatch, capsys):
    asked, broken = [], {25}

    def get(url: str) -> bytes:
        asked.append(int(Path(url).stem))
        if asked[-1] in broken:
            raise OSError("no route to host")
        return jpeg(asked[-1])

    monkeypatch.setattr(cli, "build_coco", partial(coco.build_coco, get=get, progress=False))
    assert main(["--sets", "coco", "--out", str(root)]) == 1
    error = capsys.readouterr().err
    assert "1 photos of COCO can't be fetched" in error and "train2017/000000000025.jpg" in error
    assert "no route to host" in error and "train2017.zip" in error and "--from" in error
    assert not list((root / "photos/coco").glob("*.json")), "annotations are written last"
    asked.clear()
    broken.clear()
    assert main(["--sets", "coco", "--out", str(root)]) == 0
    assert asked == [25]


def test_a_photo_of_another_size_is_refused(root, monkeypatch, capsys):
    monkeypatch.setattr(
        cli, "build_coco", partial(coco.build_coco, get=lambda url: jpeg(139), progress=False)
    )
    assert main(["--sets", "coco", "--out", str(root)]) == 1
    assert "is 640 x 426, the annotations say" in capsys.readouterr().err


def test_annotations_that_lack_ids(root, fetched, capsys):
    file = root / "coco/annotations/instances_val2017.json"
    file.unlink()
    assert main(["--sets", "coco", "--out", str(root)]) == 1
    error = capsys.readouterr().err
    assert "2 of 5 COCO ids, the first 139" in error and f"{file} is needed too" in error


class Server(BaseHTTPRequestHandler):
    """Serves `content` as COCO's does, in parts if asked."""

    content = b""
    ranges: list = []  # noqa: RUF012

    def do_GET(self):
        self.ranges.append(self.headers.get("Range"))
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:])

    def log_message(self, *arguments):
        pass


def test_annotations_are_fetched_and_a_broken_download_goes_on(root, fetched, monkeypatch):
    folder = root / "coco/annotations"
    archive = root / "all.zip"
    with zipfile.ZipFile(archive, "w") as content:
        for file in sorted(folder.iterdir()):
            content.write(file, f"annotations/{file.name}")
            file.unlink()
        content.writestr("annotations/captions_val2017.json", "{}")
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Server, "content", archive.read_bytes())
    monkeypatch.setattr(Server, "ranges", [])
    monkeypatch.setattr(coco, "ANNOTATIONS", f"http://127.0.0.1:{server.server_port}/a.zip")
    (folder / "annotations_trainval2017.zip.partial").write_bytes(Server.content[:100])
    try:
        assert main(["--sets", "coco", "--out", str(root)]) == 0
    finally:
        server.shutdown()
        server.server_close()
    assert Server.ranges == ["bytes=100-"]
    names = {file.name for file in folder.iterdir()}
    assert names == {"instances_train2017.json", "instances_val2017.json"}


def test_without_a_network_it_says_what_to_download(root, monkeypatch, capsys):
    for file in (root / "coco/annotations").iterdir():
        file.unlink()
    monkeypatch.setattr(coco, "ANNOTATIONS", "http://127.0.0.1:9/a.zip")  # nobody listens
    assert main(["--out", str(root)]) == 1
    error = capsys.readouterr().err
    assert "COCO's boxes can't be fetched" in error and "http://127.0.0.1:9/a.zip" in error
    for name in ("groceries", "airport_debris", "animals25"):
        assert f"error: {name}: not in" in error and PHOTO_SETS[name].page in error
        assert f"photos/{name}/train.json" in error


@pytest.fixture
def whole(root, fetched, tmp_path_factory):
    """A folder with all sets, made elsewhere."""
    folder = tmp_path_factory.mktemp("brought")
    assert main(["--sets", "coco", "--out", str(root)]) == 0
    for name in PHOTO_SETS:
        sets.place("coco", root / "photos/coco", folder / name, copy=True, progress=False)
    return folder


@pytest.mark.parametrize("copy", [False, True])
def test_sets_from_a_folder(root, whole, tmp_path, copy, capsys):
    command = ["--from", str(whole), "--out", str(tmp_path / "other"), *["--copy"] * copy]
    assert main(command) == 0 and main(command) == 0
    assert capsys.readouterr().out.count("airport_debris: train 3 images 4 boxes") == 2
    for name in PHOTO_SETS:
        target = tmp_path / "other/photos" / name
        assert target.is_symlink() != copy
        assert sets.verify(name, target).keys() == {"train", "val"}


def test_a_copy_that_was_interrupted_goes_on(root, whole, tmp_path):
    target = tmp_path / "other/photos/groceries"
    picture = target / "images/000000000009.jpg"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"half")
    assert (
        main(["--sets", "groceries", "--from", str(whole), "--out", str(tmp_path / "other")]) == 1
    )
    command = ["--sets", "groceries", "--from", str(whole), "--out", str(tmp_path / "other")]
    assert main([*command, "--copy"]) == 0
    assert picture.read_bytes() == (whole / "groceries/images" / picture.name).read_bytes()


def lose_a_picture(folder):
    next((folder / "images").iterdir()).unlink()


def lose_an_image(folder):
    content = json.loads((folder / "val.json").read_text())
    gone = content["images"].pop()["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != gone]
    (folder / "val.json").write_text(json.dumps(content))


def share_a_picture(folder):
    content = json.loads((folder / "val.json").read_text())
    content["images"][0]["file_name"] = "000000000009.jpg"
    (folder / "val.json").write_text(json.dumps(content))


def rename_a_picture(folder):
    content = (folder / "val.json").read_text()
    (folder / "val.json").write_text(content.replace("000000000285.jpg", "a.jpg"))
    (folder / "images/000000000285.jpg").rename(folder / "images/a.jpg")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_picture, "0 more pictures of coco are not there"),
        (lose_an_image, "has 1 images, coco has 2"),
        (share_a_picture, "is in train.json and in val.json"),
        (rename_a_picture, "must be those of COCO's ids"),
        (lambda folder: (folder / "val.json").unlink(), "val.json does not exist"),
    ],
)
def test_what_is_not_whole_is_not_taken(root, whole, tmp_path, damage, message, capsys):
    damage(whole / "coco")
    with pytest.raises(PhotosError, match=message):
        sets.verify("coco", whole / "coco")
    command = ["--sets", "coco", "--from", str(whole), "--out", str(tmp_path / "other")]
    assert main(command) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "other/photos/coco").exists()


VOC_IDS = {
    "groceries": {
        "train": {"tomato_sauce": ["A 1", "A2"], "fish": ["F1"]},
        "val": {"fish": ["F2", "F3"]},
    }
}
VOC = """<annotation><filename>old.jpg</filename><size><width>600</width><height>300</height></size>
<object><name>{name}</name><bndbox><xmin>60</xmin><ymin>30</ymin><xmax>360</xmax><ymax>{bottom}</ymax>
</bndbox></object><object><name>human</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>9</xmax>
<ymax>20</ymax></bndbox></object></annotation>"""


@pytest.fixture
def checkout(root, monkeypatch):
    """A repository with the files of `VOC_IDS`, and others."""
    monkeypatch.setattr(cli, "voc_ids", lambda: VOC_IDS)
    folder = root / "checkout"
    pixels = cv2.imencode(".png", np.full((300, 600, 3), 90, np.uint8))[1].tobytes()
    for splits in VOC_IDS.values():
        for part, stems in (item for split in splits.values() for item in split.items()):
            for stem in [*stems, "OTHER"]:
                for kind, content in (
                    ("images", pixels),
                    ("annotations", VOC.format(name=part, bottom=180).encode()),
                ):
                    file = folder / kind / part / stem
                    file.parent.mkdir(parents=True, exist_ok=True)
                    ending = ".xml" if kind == "annotations" else ".PNG"
                    file.with_name(stem + ending).write_bytes(content)
    return folder


def test_a_set_from_a_checkout(root, checkout, capsys):
    command = ["--sets", "groceries", "--out", str(root), "--checkout", str(checkout)]
    assert main(command) == 0 and main(command) == 0
    assert capsys.readouterr().out.count("groceries: train 3 images 3 boxes, val 2") == 2
    for split, count in (("train", 3), ("val", 2)):
        records = datasets.load_datasets(f"photos_groceries_{split}")
        assert len(records) == count
        names = datasets.get_metadata(f"photos_groceries_{split}").thing_classes
        assert names == ["fish", "tomato sauce"]
        for record in records:
            assert (record["width"], record["height"]) == (480, 240)
            assert cv2.imread(record["file_name"]).shape[:2] == (240, 480)
            (annotation,) = record["annotations"]  # the other has no width
            assert annotation["bbox"] == pytest.approx([48, 24, 240, 120])
            assert ("fish" in record["file_name"]) == (names[annotation["category_id"]] == "fish")


def test_a_checkout_that_is_not_whole(root, checkout, capsys):
    (checkout / "images/fish/F2.PNG").unlink()
    command = ["--sets", "groceries", "--out", str(root), "--checkout", str(checkout)]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "lacks 1 of 5 pictures" in error and "fish/F2" in error and "github.com" in error
    (checkout / "images/fish/F2.PNG").write_bytes(b"no picture")
    assert main(command) == 1
    assert "F2.PNG is no picture" in capsys.readouterr().err
    (checkout / "annotations/fish/F2.xml").write_text("<annotation>")
    assert main(command) == 1
    assert "F2.xml: not valid XML" in capsys.readouterr().err
    assert not list((root / "photos/groceries").glob("*.json"))


def test_a_checkout_is_of_one_set(checkout, capsys):
    for names in ([], ["--sets", "coco"]):
        with pytest.raises(SystemExit):
            main([*names, "--checkout", str(checkout)])
        assert "--checkout is of one set: add --sets groceries" in capsys.readouterr().err


def test_a_missing_set_is_named_with_the_command(tmp_path):
    datasets.register_builtin(tmp_path)
    try:
        with pytest.raises(FileNotFoundError, match="data.photos --sets groceries"):
            datasets.load_datasets("photos_groceries_train")
    finally:
        datasets.register_builtin()
