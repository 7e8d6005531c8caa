"""What a file or folder is, by its content; confusions; parts."""

import json
import shutil

import pytest
from dynamic_dino.data import datasets
from dynamic_dino.data.__main__ import main
from dynamic_dino.data.formats import recognise
from helpers import formats, miniatures


@pytest.mark.parametrize(
    "writer, old, new",
    [
        ("cvat", "annotations.xml", "labels.txt.xml"),
        ("label studio", "project-3-at-2024-01-01.json", "instances.json"),
        ("csv", "labels.csv", "labels.txt"),
        ("roboflow", "train/_annotations.coco.json", "train/labelme.json"),
    ],
)
def test_names_of_files_do_not_matter(writer, old, new, tmp_path, rng):
    formats.WRITERS[writer](tmp_path, formats.photos(rng))
    kind = recognise(tmp_path).format
    (tmp_path / old).rename(tmp_path / new)
    assert recognise(tmp_path).format == kind
    assert recognise(tmp_path / new).format == kind


def test_grounding_in_a_folder(tmp_path, rng, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    miniatures.write_flickr30k(tmp_path, rng)
    assert datasets.locate_dataset(str(tmp_path)).format == "mdetr"
    records = datasets.load_datasets(str(tmp_path))  # images are in another folder
    assert "caption" in records[0]
    assert main(["check", str(tmp_path)]) == 0


def test_nothing_known_says_what_was_found(tmp_path, rng):
    formats.draw(tmp_path, formats.photos(rng, 3))
    (tmp_path / "notes.txt").write_text("hello\n")
    (tmp_path / "notes.json").write_text('{"categories": [], "info": {}}')  # Label Studio's
    (tmp_path / "createml.json").write_text('[{"image": "a.jpg", "annotations": []}]')
    (tmp_path / "page.xml").write_text("<html/>")
    with pytest.raises(ValueError) as error:
        datasets.load_datasets(str(tmp_path))
    for word in ("3 .jpg", "2 .json", "Pascal VOC XML", "Label Studio JSON", "CSV"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match="no annotations"):
        datasets.load_datasets(str(tmp_path / "page.xml"))
    with pytest.raises(ValueError, match="unknown data set.*YOLO txt"):
        datasets.load_datasets(str(tmp_path / "gone"))


def test_two_data_sets_in_a_folder(tmp_path, rng, capsys):
    photos = formats.photos(rng)
    formats.write_labelimg(tmp_path, photos)
    formats.write_labelimg_yolo(tmp_path, photos)
    with pytest.raises(ValueError) as error:
        datasets.load_datasets(str(tmp_path))
    for word in ("more than one data set", "Pascal VOC XML (photo 0.xml and 3 more)", "YOLO txt"):
        assert word in str(error.value)
    out = tmp_path / "out/a.json"
    assert main(["convert", str(tmp_path), str(out), "--to", "coco", "--from", "voc"]) == 0
    assert "Pascal VOC XML: 4 images" in capsys.readouterr().out


def test_one_file_of_yolo_is_no_data_set(tmp_path, rng):
    formats.write_labelimg_yolo(tmp_path, formats.photos(rng))
    with pytest.raises(ValueError, match="labels of one image: name the folder"):
        datasets.load_datasets(str(tmp_path / "photo 0.txt"))
    assert datasets.load_datasets(str(tmp_path)) is not None


def test_one_file_of_voc_or_labelme_is_one_image(tmp_path, rng):
    photos = formats.photos(rng)
    formats.write_labelimg(tmp_path / "voc", photos)
    formats.write_labelme(tmp_path / "labelme", photos)
    for file in ("voc/photo 1.xml", "labelme/photo 1.json"):
        assert len(datasets.load_datasets(str(tmp_path / file))) == 1


def both(folder, rng, writer, train="train", val="valid"):
    """A folder for each part, as Roboflow exports most formats; val lacks a name."""
    photos = formats.photos(rng), formats.photos(rng, 3, first=10)
    photos[1][0].boxes = [box for box in photos[1][0].boxes if box[0] != formats.NAMES[1]]
    photos[1][1].boxes = []
    for name, part in zip((train, val), photos, strict=True):
        formats.WRITERS[writer](folder / name, part)
    return photos


@pytest.mark.parametrize("writer", ["labelimg", "labelme", "csv", "label studio", "cvat"])
def test_parts_are_folders(writer, tmp_path, rng, capsys):
    photos = both(tmp_path, rng, writer)
    with pytest.raises(ValueError, match=f"has the parts train, val: say which, {tmp_path}:train"):
        datasets.load_datasets(str(tmp_path))
    for part, these in zip(("train", "val"), photos, strict=True):
        name = f"{tmp_path}:{part}"
        records = datasets.load_datasets(name)
        names = datasets.get_metadata(name).thing_classes
        expected = formats.truth([p for p in these if p.boxes or writer != "csv"])
        if writer == "label studio":
            expected = {name.replace(" ", "_"): boxes for name, boxes in expected.items()}
        assert formats.found(records, names) == expected
        assert names == list(formats.NAMES)  # those of all parts
        assert records[0]["dataset_name"] == name
    with pytest.raises(ValueError, match="has no part 'test', only train, val"):
        datasets.load_datasets(f"{tmp_path}:test")
    assert main(["check", str(tmp_path)]) == 0  # each part
    assert f"{tmp_path}:val" in capsys.readouterr().out


def test_parts_of_roboflows_coco_and_their_images(tmp_path, rng):
    photos = both(tmp_path, rng, "roboflow")
    for part in ("train", "valid"):  # each export has one more folder here
        for file in (tmp_path / part / "train").iterdir():
            file.rename(tmp_path / part / file.name)
        (tmp_path / part / "train").rmdir()
        (tmp_path / part / "README.roboflow.txt").unlink()
    records = datasets.load_datasets(f"{tmp_path}:val")
    assert formats.found(records, formats.NAMES) == formats.truth(photos[1])


def test_parts_of_coco_files(tmp_path, rng):
    photos = {"train": formats.photos(rng), "val": formats.photos(rng, 3, first=10)}
    (tmp_path / "annotations").mkdir()
    for part, these in photos.items():
        formats.draw(tmp_path / f"{part}2017", these)
        content = json.dumps(formats.roboflow_coco(these))
        (tmp_path / f"annotations/instances_{part}2017.json").write_text(content)
    for part, these in photos.items():
        records = datasets.load_datasets(f"{tmp_path}:{part}")
        assert formats.found(records, formats.NAMES) == formats.truth(these)
    # images of the same names in both parts
    shutil.copytree(tmp_path / "val2017", tmp_path / "train2017", dirs_exist_ok=True)
    records = datasets.load_datasets(f"{tmp_path}:val")
    assert all(str(tmp_path / "val2017") in record["file_name"] for record in records)
    shutil.copytree(tmp_path / "val2017", tmp_path / "more/val")
    with pytest.raises(ValueError, match="say the folder of the images"):
        datasets.load_datasets(f"{tmp_path}:val")
    shutil.rmtree(tmp_path / "more")
    shutil.copy(
        tmp_path / "annotations/instances_val2017.json", tmp_path / "annotations/other_val.json"
    )
    with pytest.raises(ValueError, match="2 files of COCO JSON for the part 'val'"):
        datasets.load_datasets(f"{tmp_path}:val")


def test_parts_of_a_data_yaml(tmp_path, rng):
    """Roboflow's: paths that begin with ../ though they mean this folder, and a part that isn't
    there."""
    photos = {"train": formats.photos(rng), "valid": formats.photos(rng, 3, first=10)}
    for part, these in photos.items():
        formats.draw(tmp_path / part / "images", these)
        formats.write_yolo_labels(tmp_path / part / "labels", these)
    (tmp_path / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 3\n"
        f"names: {list(formats.NAMES)}\n\nroboflow:\n  workspace: mine\n"
    )
    for path in (tmp_path, tmp_path / "data.yaml"):
        for part, these in (("train", photos["train"]), ("val", photos["valid"])):
            records = datasets.load_datasets(f"{path}:{part}")
            assert formats.found(records, formats.NAMES) == formats.truth(these)
    records = datasets.load_datasets(str(tmp_path / "train"))  # names from the folder above
    assert formats.found(records, formats.NAMES) == formats.truth(photos["train"])


def test_lists_of_images_in_a_data_yaml(tmp_path, rng):
    photos = formats.photos(rng, 4)
    path = formats.write_ultralytics(tmp_path, photos)
    lines = [f"./images/train/{photo.name}" for photo in photos]
    (tmp_path / "a.txt").write_text("\n".join(lines[:3]))
    (tmp_path / "b.txt").write_text("\n".join(lines[3:]))
    text = (tmp_path / "data.yaml").read_text()
    text = text.replace("train: images/train", "train: a.txt").replace("val:", "val: b.txt")
    (tmp_path / "data.yaml").write_text(text)
    for part, these in (("train", photos[:3]), ("val", photos[3:])):
        records = datasets.load_datasets(f"{path}:{part}")
        assert formats.found(records, formats.NAMES) == formats.truth(these)


def test_image_sets_of_voc(tmp_path, rng):
    photos = formats.photos(rng, 5)
    path = formats.write_voc(tmp_path, photos)
    sets = tmp_path / "ImageSets/Main"
    sets.mkdir(parents=True)
    for i, photo in enumerate(photos):  # names without spaces, as VOC's
        stem = f"{i:06d}"
        (tmp_path / f"Annotations/{photo.stem}.xml").rename(tmp_path / f"Annotations/{stem}.xml")
        (tmp_path / f"JPEGImages/{photo.name}").rename(tmp_path / f"JPEGImages/{stem}.jpg")
        photo.name = f"{stem}.jpg"
    (sets / "train.txt").write_text("000000\n000001\n000004\n")
    (sets / "val.txt").write_text("000002\n000003\n")
    (sets / "cat_train.txt").write_text("000000 -1\n000001  1\n")
    for part, these in (("train", [photos[i] for i in (0, 1, 4)]), ("val", photos[2:4])):
        records = datasets.load_datasets(f"{path}:{part}")
        names = datasets.get_metadata(f"{path}:{part}").thing_classes
        assert formats.found(records, names) == formats.truth(these)
        assert names == list(formats.NAMES)
    (sets / "val.txt").write_text("000002\n000009\n")
    with pytest.raises(ValueError, match=r"val\.txt: it lists '000009', which has no XML"):
        datasets.load_datasets(f"{path}:val")


def test_subsets_of_cvat(tmp_path, rng):
    photos = formats.photos(rng, 4)
    formats.draw(tmp_path / "images", photos)
    images = "".join(
        formats.cvat_image(i, p).replace(
            "<image ", f"<image subset='{'Train' if i < 3 else 'val'}' "
        )
        for i, p in enumerate(photos)
    )
    file = tmp_path / "annotations.xml"
    file.write_text(formats.cvat_xml(images))
    for part, these in (("train", photos[:3]), ("val", photos[3:])):
        records = datasets.load_datasets(f"{file}:{part}")
        assert formats.found(records, formats.NAMES) == formats.truth(these)


def test_files_outside_the_parts(tmp_path, rng):
    both(tmp_path, rng, "labelimg")
    formats.write_labelimg(tmp_path / "more", formats.photos(rng, 2, first=50))
    with pytest.raises(ValueError, match="lie in parts .train, val., others, such as more/photo"):
        datasets.load_datasets(f"{tmp_path}:train")


def test_images_may_be_in_another_folder(tmp_path, rng):
    photos = formats.photos(rng)
    formats.write_cvat(tmp_path / "labels", photos)
    shutil.move(tmp_path / "labels/images", tmp_path / "far")
    file = tmp_path / "labels/annotations.xml"
    with pytest.raises(ValueError, match="name the folder of the images"):
        datasets.load_datasets(str(file))
    (records,) = datasets.load_own_data(file, tmp_path / "far")
    assert formats.found(records, formats.NAMES) == formats.truth(photos)
    assert main(["check", str(file), "--image-folder", str(tmp_path / "far")]) == 0


def test_folders_behind_links_and_names_in_another_case(tmp_path, rng):
    photos = formats.photos(rng)
    formats.write_labelimg(tmp_path / "voc", photos)
    (tmp_path / "far").mkdir()
    for photo in photos:
        (tmp_path / "voc" / photo.name).rename(tmp_path / "far" / photo.name.upper())
    (tmp_path / "voc/photos").symlink_to(tmp_path / "far")
    (tmp_path / "voc/photos/again").symlink_to(tmp_path / "voc")  # a circle
    records = datasets.load_datasets(str(tmp_path / "voc"))
    names = datasets.get_metadata(str(tmp_path / "voc")).thing_classes
    found = formats.found(records, names)
    assert found == {n.upper(): boxes for n, boxes in formats.truth(photos).items()}


def test_an_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / "export.zip").write_bytes(b"PK")
    for path in (tmp_path, tmp_path / "export.zip"):
        with pytest.raises(ValueError, match=r"found: 1 \.zip.*Unpack the \.zip first"):
            datasets.load_datasets(str(path))


def test_images_of_one_name_in_two_folders(tmp_path):
    photos = [formats.Photo("a.jpg", 50, 40, [("cat", (3, 4, 20, 30))])]
    other = [formats.Photo("a.jpg", 50, 40, [("dog", (1, 2, 9, 9))])]
    for folder, these in (("x", photos), ("y", other)):
        formats.write_labelimg(tmp_path / folder, these)
    records = datasets.load_datasets(str(tmp_path))
    names = datasets.get_metadata(str(tmp_path)).thing_classes
    found = {r["file_name"]: names[r["annotations"][0]["category_id"]] for r in records}
    assert found == {f"{tmp_path}/x/a.jpg": "cat", f"{tmp_path}/y/a.jpg": "dog"}
    rows = [["filename", "class", "xmin", "ymin", "xmax", "ymax"], ["a.jpg", "cat", 1, 2, 9, 9]]
    file = formats.write_rows(tmp_path / "labels.csv", rows)
    with pytest.raises(ValueError, match="several images may be meant"):
        datasets.load_datasets(str(file))
