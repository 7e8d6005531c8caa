import json

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from dynamic_dino.data import (
    TestMapper,
    TrainMapper,
    color_jitter,
    detr_augmentations,
    large_scale_jitter,
    load_datasets,
    load_odvg_jsonl,
)
from helpers.seeds import fresh_rng
from PIL import Image

NAMES = ["red panda", "windmill", "tombstone", "gravestone", "harp", "kite"]


@pytest.fixture
def data(tmp_path):
    """A 60 x 40 image with two boxes and a crowd; the JSON's path is the name of the data set."""
    pixels = fresh_rng().integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    categories[2]["near_synonyms"] = ["gravestone"]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [6, 4, 20, 10]},
        {"id": 2, "image_id": 1, "category_id": 0, "bbox": [30, 10, 30, 30]},
        {"id": 3, "image_id": 1, "category_id": 5, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        *(  # elsewhere, every name has a box
            {"id": 10 + i, "image_id": 2, "category_id": i, "bbox": [1, 1, 9, 9]} for i in range(6)
        ),
    ]
    content = {
        "images": [
            {"id": i, "file_name": f, "width": 60, "height": 40}
            for i, f in ((1, "a.png"), (2, "b"))
        ],
        "annotations": annotations,
        "categories": categories,
    }
    file = tmp_path / "data.json"
    file.write_text(json.dumps(content))
    return str(file), load_datasets(str(file))[0], pixels


def boxes_by_phrase(sample):
    instances, phrases = sample["instances"], sample["prompt"].phrases
    return {
        phrases[c]: box
        for c, box in zip(
            instances.gt_classes.tolist(), instances.gt_boxes.tensor.tolist(), strict=True
        )
    }


def test_resized_and_flipped_boxes(data):
    name, record, pixels = data
    rng = fresh_rng()
    plain = TrainMapper(name, 120, max_phrases=4, flip=0.0)(record, rng)
    assert plain["image_size"] == (80, 120)
    assert plain["image"].shape == (3, 80, 120) and plain["image"].dtype == torch.uint8
    assert boxes_by_phrase(plain) == {
        "tombstone": [12, 8, 52, 28],
        "red panda": [60, 20, 120, 80],
    }
    flipped = TrainMapper(name, 120, max_phrases=4, flip=1.0)(record, rng)
    assert boxes_by_phrase(flipped) == {
        "tombstone": [68, 8, 108, 28],
        "red panda": [0, 20, 60, 80],
    }
    assert torch.equal(flipped["image"], plain["image"].flip(-1))
    same = TrainMapper(name, 60, max_phrases=4, flip=0.0)(record, rng)
    assert np.array_equal(same["image"].permute(1, 2, 0).numpy(), pixels)  # RGB
    assert {plain[key] for key in ("height", "width", "image_id")} == {40, 60, 1}


def test_short_and_long_edge(data):
    name, record, _ = data
    rng = fresh_rng()
    assert TrainMapper(name, (80, 1000))(record, rng)["image_size"] == (80, 120)
    assert TrainMapper(name, (80, 90))(record, rng)["image_size"] == (60, 90)
    assert TrainMapper(name, None)(record, rng)["image_size"] == (40, 60)


def test_prompt_and_labels(data):
    name, record, _ = data
    mapper = TrainMapper(name, 60, max_phrases=6)
    for seed in range(20):
        sample = mapper(record, np.random.default_rng(seed))
        phrases = sample["prompt"].phrases
        # no kite, which a crowd shows, and no gravestone, which is akin to the tombstone
        assert sorted(phrases) == ["harp", "red panda", "tombstone", "windmill"]
        assert set(boxes_by_phrase(sample)) == {"tombstone", "red panda"}


def test_classes_that_the_prompt_lacks_lose_their_boxes(data):
    name, record, _ = data
    mapper = TrainMapper(name, 60, max_phrases=1, flip=0.0)
    seen = set()
    for seed in range(20):
        sample = mapper(record, np.random.default_rng(seed))
        assert list(boxes_by_phrase(sample)) == sample["prompt"].phrases
        seen.update(sample["prompt"].phrases)
    assert seen == {"tombstone", "red panda"}


def test_cropped_objects_leave_the_labels_but_become_no_negatives(data):
    name, record, _ = data

    class LeftHalf(T.Augmentation):
        def get_transform(self, image):
            return T.CropTransform(0, 0, 30, image.shape[0])

    mapper = TrainMapper(name, None, max_phrases=6, flip=0.0, augmentations=[LeftHalf()])
    for seed in range(10):
        sample = mapper(record, np.random.default_rng(seed))
        assert sample["image_size"] == (40, 30)
        assert boxes_by_phrase(sample) == {"tombstone": [6, 4, 26, 14]}
        assert "red panda" not in sample["prompt"].phrases


def test_a_closed_set_is_asked_for_all_its_classes(data):
    name, record, _ = data
    mapper = TrainMapper(name, 60, max_phrases=None, flip=0.0)
    for seed in range(3):
        sample = mapper(record, np.random.default_rng(seed))
        assert sample["prompt"].phrases == NAMES
        assert sample["instances"].gt_classes.tolist() == [2, 0]
    assert mapper(record, fresh_rng())["prompt"] is sample["prompt"]
    with pytest.raises(ValueError, match="min_phrases 7, max_phrases 6"):
        TrainMapper(name, 60, min_phrases=7, max_phrases=None)


def test_without_any_object(data):
    name, record, _ = data
    empty = {**record, "annotations": []}
    sample = TrainMapper(name, 60, max_phrases=3)(empty, fresh_rng())
    assert len(sample["prompt"].phrases) == 3
    assert sample["instances"].gt_boxes.tensor.shape == (0, 4)
    assert sample["instances"].gt_classes.dtype == torch.int64
    sample = TestMapper(name, 60)(empty)
    assert sample["instances"].gt_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize("recipe", ["jitter", "detr", "scale"])
def test_augmentation_is_a_function_of_the_generator(data, recipe):
    name, record, _ = data
    augmentation, size = {
        "jitter": (color_jitter(), 60),
        "detr": (detr_augmentations((50, 60, 70), 100), None),
        "scale": (large_scale_jitter(60), None),
    }[recipe]
    mapper = TrainMapper(name, size, augmentations=[augmentation])
    seed = int(fresh_rng().integers(1 << 30))
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    one = mapper(record, np.random.default_rng(seed))
    assert np.array_equal(np.random.get_state()[1], before)  # others' randomness is left alone
    np.random.seed(6)
    two = mapper(record, np.random.default_rng(seed))
    assert torch.equal(one["image"], two["image"])
    assert torch.equal(one["instances"].gt_boxes.tensor, two["instances"].gt_boxes.tensor)
    assert one["prompt"] == two["prompt"]
    others = [mapper(record, np.random.default_rng(seed + i))["image"] for i in range(1, 9)]
    assert any(o.shape != one["image"].shape or not torch.equal(o, one["image"]) for o in others)


def test_boxes_follow_the_pixels(tmp_path):
    """A white square on black must stay under its box whatever the augmentation does."""
    pixels = np.zeros((90, 120, 3), dtype=np.uint8)
    pixels[20:60, 30:80] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 120, "height": 90}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [30, 20, 50, 40]}],
        "categories": [{"id": 1, "name": "square"}],
    }
    (tmp_path / "d.json").write_text(json.dumps(content))
    name = str(tmp_path / "d.json")
    (record,) = load_datasets(name)
    mappers = [
        TrainMapper(name, 100, augmentations=[large_scale_jitter(100)]),
        TrainMapper(name, None, augmentations=[detr_augmentations((90, 100), 200)]),
        TrainMapper(name, None, augmentations=[large_scale_jitter(100, 0.5, 2.0)]),
    ]
    rng, compared = fresh_rng(), 0
    for mapper in mappers:
        for _ in range(8):
            sample = mapper(record, rng)
            bright = (sample["image"].float().mean(0) > 127).nonzero()
            for box in sample["instances"].gt_boxes.tensor:
                (top, left), (bottom, right) = bright.amin(0), bright.amax(0) + 1
                drawn = torch.stack([left, top, right, bottom]).float()
                assert (box - drawn).abs().max() <= 1.0
                compared += 1
    assert compared > 12


def test_evaluation_with_all_names(data):
    name, record, _ = data
    mapper = TestMapper(name, 120)
    one, two = mapper(record), mapper(record)
    assert one["prompt"] is two["prompt"]
    assert one["image"] is two["image"], "a file is decoded once for the records after each other"
    assert one["prompt"].phrases == NAMES and one["prompt_classes"] == list(range(6))
    assert one["image_size"] == (80, 120) and (one["height"], one["width"]) == (40, 60)
    assert boxes_by_phrase(one) == {"tombstone": [12, 8, 52, 28], "red panda": [60, 20, 120, 80]}


def test_evaluation_with_n_names(data):
    name, record, _ = data
    one, two = (TestMapper(name, 120, prompt_names=4)(record) for _ in range(2))
    assert one["prompt"] == two["prompt"]
    assert [NAMES[i] for i in one["prompt_classes"]] == one["prompt"].phrases
    assert {"tombstone", "red panda", "kite"} <= set(one["prompt"].phrases)  # all that is there
    assert "gravestone" not in one["prompt"].phrases and len(one["prompt_classes"]) == 4
    assert set(boxes_by_phrase(one)) == {"tombstone", "red panda"}
    with pytest.raises(ValueError, match="prompt_names='some'"):
        TestMapper(name, 120, prompt_names="some")


def test_names_without_a_box_are_not_asked_for(data):
    """Unless all names are wanted: exporters put names of groups among them."""
    name, record, _ = data
    content = json.loads(open(name).read())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] not in (1, 3)]
    with open(name, "w") as file:
        json.dump(content, file)
    load_datasets(name)
    bare = {NAMES[1], NAMES[3]}
    train = TrainMapper(name, 60, max_phrases=6)
    drawn = [train(record, np.random.default_rng(seed))["prompt"].phrases for seed in range(20)]
    assert not bare & {phrase for phrases in drawn for phrase in phrases}
    sample = TestMapper(name, 60)(record)
    assert sample["prompt_classes"] == [0, 2, 4, 5]
    assert sample["prompt"].phrases == [NAMES[i] for i in (0, 2, 4, 5)]
    assert set(boxes_by_phrase(sample)) == {"tombstone", "red panda"}
    assert not bare & {*TestMapper(name, 60, prompt_names=6)(record)["prompt"].phrases}
    assert TestMapper(name, 60, prompt_names="all")(record)["prompt"].phrases == NAMES
    closed = TrainMapper(name, 60, max_phrases=None)(record, np.random.default_rng(0))
    assert closed["prompt"].phrases == NAMES  # a closed set is what it is


def test_grounding_spans_survive(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    caption = "A red panda left of a windmill."
    regions = [
        {"bbox": [6, 4, 26, 14], "phrase": "windmill"},
        {"bbox": [30, 10, 60, 40], "phrase": "red panda"},
    ]
    line = {"filename": "a.png", "height": 40, "width": 60}
    line["grounding"] = {"caption": caption, "regions": regions}
    (tmp_path / "g.jsonl").write_text(json.dumps(line))
    name = str(tmp_path / "g.jsonl")
    (record,) = load_odvg_jsonl(name, tmp_path)
    for mapped in (
        TrainMapper(name, 120, flip=1.0)(record, fresh_rng()),  # "left" isn't flipped
        TestMapper(name, 120)(record),
    ):
        assert mapped["prompt"].text == caption
        assert mapped["prompt"].spans == (((22, 30),), ((2, 11),))
        assert boxes_by_phrase(mapped) == {
            "windmill": [12, 8, 52, 28],
            "red panda": [60, 20, 120, 80],
        }
    record["caption"] = caption.replace("left", "east")
    mapped = TrainMapper(name, 120, flip=1.0)(record, fresh_rng())
    assert boxes_by_phrase(mapped)["windmill"] == [68, 8, 108, 28]


def test_records_choose_the_names_of_their_data_set(data, tmp_path):
    name, record, _ = data
    content = json.loads(open(name).read())
    content["categories"] = [{"id": i, "name": f"other {i}"} for i in range(6)]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    second = load_datasets(str(other))[0]
    mapper = TrainMapper([name, str(other)], 60)
    assert set(boxes_by_phrase(mapper(record, fresh_rng()))) == {
        "tombstone",
        "red panda",
    }
    assert set(boxes_by_phrase(mapper(second, fresh_rng()))) == {"other 2", "other 0"}
    with pytest.raises(ValueError, match="comes from data set 'third'"):
        mapper({**record, "dataset_name": "third"}, fresh_rng())


def test_exif_orientation(data, tmp_path):
    name, record, pixels = data
    turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
    turned.save(record["file_name"], exif=exif)
    sample = TestMapper(name, 60)(record)
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize(
    "damage, kind, words",
    [
        (lambda path: path.unlink(), FileNotFoundError, "does not exist"),
        (lambda path: path.write_bytes(b"not an image"), ValueError, "can't be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), ValueError, "can't be read"),
        (lambda path: path.write_bytes(b""), ValueError, "can't be read"),
        (lambda path: Image.new("RGB", (40, 60)).save(path), ValueError, "40 x 60"),
    ],
)
def test_bad_images_are_named(data, tmp_path, damage, kind, words):
    name, record, _ = data
    damage(tmp_path / "a.png")
    for mapped in (
        lambda: TestMapper(name, 60)(record),
        lambda: TrainMapper(name, 60)(record, fresh_rng()),
    ):
        with pytest.raises(kind) as error:
            mapped()
        assert record["file_name"] in str(error.value) and words in str(error.value)


def test_extreme_aspect_ratio(data):
    name, record, _ = data
    Image.new("RGB", (600, 1)).save(record["file_name"])
    thin = {**record, "height": 1, "width": 600, "annotations": []}
    assert TestMapper(name, 60)(thin)["image"].shape == (3, 1, 60)


@pytest.fixture
def grounding(tmp_path):
    """A picture of two pandas, a mill and a cloud, with their caption."""
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    caption = "A red panda and a black panda at a windmill under a cloud"
    regions = [
        {"bbox": [0, 0, 10, 10], "phrase": "red panda"},
        {"bbox": [20, 0, 30, 10], "phrase": "black panda"},
        {"bbox": [40, 0, 50, 10], "phrase": "windmill"},
        {"bbox": [0, 20, 10, 30], "phrase": "cloud"},
        {"bbox": [20, 20, 30, 30], "phrase": "cloud"},
    ]
    line = {"filename": "a.png", "height": 40, "width": 60}
    line["grounding"] = {"caption": caption, "regions": regions}
    name = str(tmp_path / "g.jsonl")
    (tmp_path / "g.jsonl").write_text(json.dumps(line))
    return name, load_odvg_jsonl(name, tmp_path)[0]


WHERE = {"red panda": [(0, 0)], "black panda": [(20, 0)], "windmill": [(40, 0)]} | {
    "cloud": [(0, 20), (20, 20)]
}


def corners_by_phrase(sample):
    phrases, found = sample["prompt"].phrases, {}
    instances = sample["instances"]
    for label, box in zip(instances.gt_classes, instances.gt_boxes.tensor.tolist(), strict=True):
        found.setdefault(phrases[label], []).append((box[0], box[1]))
    return found


def test_a_caption_or_its_phrases(grounding):
    name, record = grounding
    mapper = TrainMapper(name, 60, flip=0.0, phrase_prompts=0.5)
    texts = {}
    for seed in range(60):
        sample = mapper(record, np.random.default_rng(seed))
        assert corners_by_phrase(sample) == WHERE and sample["caption"] == record["caption"]
        texts[sample["prompt"].text] = texts.get(sample["prompt"].text, 0) + 1
    assert 15 < texts.pop(record["caption"]) < 45  # half of them, more or less
    assert len(texts) > 10  # the others in many orders
    assert all(set(text.rstrip(".").split(". ")) == set(WHERE) for text in texts)


def test_dropped_phrases_take_their_boxes_along(grounding):
    name, record = grounding
    mapper = TrainMapper(name, 60, flip=0.0, phrase_prompts=1.0, phrase_dropout=0.5)
    seen = set()
    for seed in range(80):
        sample = mapper(record, np.random.default_rng(seed))
        found = corners_by_phrase(sample)
        assert set(found) == set(sample["prompt"].phrases)  # nothing is asked for in vain
        assert all(found[phrase] == WHERE[phrase] for phrase in found)
        assert ("red panda" in found) == ("black panda" in found)
        seen.add(frozenset(found))
    assert len(seen) == 7


def test_runs_without_phrase_prompts_keep_their_random_numbers(grounding, data):
    name, record = grounding
    generators = [np.random.default_rng(5) for _ in range(2)]
    TrainMapper(name, 60)(record, generators[0])
    TrainMapper([name, [data[0]]], 60, phrase_dropout=0.5)(record, generators[1])
    assert generators[0].random() == generators[1].random()
    with pytest.raises(ValueError, match=r"phrase_prompts=1\.5"):
        TrainMapper(name, 60, phrase_prompts=1.5)
