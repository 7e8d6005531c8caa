"""The published data sets, as miniatures in their exact formats, load by their names."""

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from dynamic_dino.data import ODINW13, ODINW35, datasets, odinw_names
from dynamic_dino.data.builtin import BUILTIN
from dynamic_dino.data.coco_json import clean_name
from dynamic_dino.data.odinw import MINIVAL, PROMPTS
from dynamic_dino.data.synthetic.drawn import NAMES
from helpers import miniatures
from helpers.seeds import fresh_rng


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    miniatures.write_all(root, seed=int(fresh_rng().integers(1 << 30)))
    return root


@pytest.fixture
def root(written):
    datasets.register_builtin(written)
    yield written
    datasets.register_builtin()


def check_images_and_boxes(records):
    assert records
    for record in records:
        assert Path(record["file_name"]).is_file()
        assert record["annotations"]
        for annotation in record["annotations"]:
            x, y, w, h = annotation["bbox"]
            assert annotation["bbox_mode"] == BoxMode.XYWH_ABS
            assert x >= 0 and y >= 0 and w > 0 and h > 0
            assert x + w <= record["width"] and y + h <= record["height"]


@pytest.mark.parametrize("name", ["objects365_v1_train", "v3det_train", "coco_2017_train"])
def test_detection_training_sets(root, name):
    records = datasets.load_datasets(name)
    check_images_and_boxes(records)
    assert datasets.get_metadata(name).thing_classes == list(NAMES)
    assert not hasattr(datasets.get_metadata(name), "novel")  # V3Det's novel classes train as well
    assert {record["dataset_name"] for record in records} == {name}


@pytest.mark.parametrize("name", ["gqa_train", "flickr30k_train"])
def test_grounding_training_sets(root, name):
    records = datasets.load_datasets(name)
    check_images_and_boxes(records)
    assert MetadataCatalog.get(name).evaluator_type == "grounding"
    for record in records:
        assert isinstance(record["width"], int)  # Flickr30k writes text
        phrases = [
            " ".join(record["caption"][s:e] for s, e in spans) for spans in record["phrase_spans"]
        ]
        assert phrases and set(phrases) <= set(NAMES)
        assert {a["category_id"] for a in record["annotations"]} == set(range(len(phrases)))


@pytest.mark.parametrize("name", ["lvis_v1_val", "lvis_v1_minival"])
def test_lvis(root, name):
    records = datasets.load_datasets(name)
    check_images_and_boxes(records)
    metadata = datasets.get_metadata(name)
    assert metadata.thing_classes == list(NAMES)  # from "Red_circle_(drawn_shape)"
    assert metadata.evaluator_type == "lvis"
    assert metadata.frequency == ["rcf"[i % 3] for i in range(1, 13)]
    assert metadata.thing_dataset_id_to_contiguous_id == {i: i - 1 for i in range(1, 13)}
    assert records[0]["neg_category_ids"] == [3, 8]
    assert records[0]["not_exhaustive_category_ids"] == [4]
    folders = {Path(record["file_name"]).parent.name for record in records}
    assert folders == {"train2017", "val2017"}


@pytest.mark.parametrize("name", ["refcoco_val", "refcoco+_testB", "refcocog_test"])
def test_referring_expressions(root, name):
    records = datasets.load_datasets(name)
    check_images_and_boxes(records)
    assert MetadataCatalog.get(name).evaluator_type == "refexp"
    assert len({record["image_id"] for record in records}) == len(records)
    for record in records:
        assert len(record["annotations"]) == 1
        assert record["phrase_spans"] == [[[0, len(record["caption"])]]]
        assert record["annotations"][0]["category_id"] == 0


def test_odinw_with_and_without_prompts(root):
    name, prompted = (odinw_names(("CottontailRabbits",), prompts=p)[0] for p in (False, True))
    check_images_and_boxes(datasets.load_datasets(name))
    assert datasets.get_metadata(name).thing_classes == ["cottontail-rabbit"]
    assert datasets.get_metadata(prompted).thing_classes == ["rabbit"]
    plain, other = datasets.load_datasets([name, prompted])
    assert [r["annotations"] for r in plain] == [r["annotations"] for r in other]
    # a set without prompts of its own has one name
    assert odinw_names(("Raccoon",), prompts=True) == ["odinw_Raccoon_val"]
    check_images_and_boxes(datasets.load_datasets("odinw_Raccoon_val"))


def test_odinw_is_found_without_the_folder_of_the_version(tmp_path):
    rng = fresh_rng()
    miniatures.write_odinw(tmp_path, rng, "odinw/Raccoon/valid", ("raccoon",))
    datasets.register_builtin(tmp_path)
    try:
        check_images_and_boxes(datasets.load_datasets("odinw_Raccoon_val"))
        with pytest.raises(FileNotFoundError, match=r"Raccoon\.v2-raw\.coco/train.*GLIPModel"):
            datasets.load_datasets("odinw_Raccoon_train")
    finally:
        datasets.register_builtin()


def test_odinw_lists():
    assert len(ODINW13) == len(set(ODINW13)) == 13
    assert len(ODINW35) == len(set(ODINW35)) == 35
    assert set(ODINW13) <= set(ODINW35) and set(PROMPTS) | set(MINIVAL) <= set(ODINW35)
    for split in ("train", "val"):
        for prompts in (False, True):
            assert set(odinw_names(ODINW35, split, prompts)) <= set(DatasetCatalog.list())
    assert PROMPTS["ChessPieces"][2] == "black bishop"
    assert PROMPTS["ChessPieces"][13] == "white rook"


def test_every_name_says_where_it_comes_from():
    for entry in BUILTIN.values():
        assert entry.files and entry.licence and entry.remedy
        assert entry.page.startswith(("https://", "python -m dynamic_dino.data."))


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_odvg_is_taken_where_there_is_no_mdetr_file(tmp_path, ending):
    rng = fresh_rng()
    miniatures.write_gqa(tmp_path, rng)
    datasets.register_builtin(tmp_path)
    try:
        records = datasets.load_datasets("gqa_train")
        file = tmp_path / "mdetr_annotations/final_mixed_train_no_coco.json"
        file.unlink()
        odvg = tmp_path / f"gqa/final_mixed_train_no_coco_vg{ending}"
        odvg.write_text("\n".join(json.dumps(as_odvg(record)) for record in records))
        again = datasets.load_datasets("gqa_train")
        for a, b in zip(records, again, strict=True):
            assert {k: v for k, v in a.items() if k != "image_id"} == {
                k: v for k, v in b.items() if k != "image_id"
            }
    finally:
        datasets.register_builtin()


def as_odvg(record):
    regions = []
    for annotation in record["annotations"]:
        spans = record["phrase_spans"][annotation["category_id"]]
        x, y, w, h = annotation["bbox"]
        regions.append(
            {
                "bbox": [x, y, x + w, y + h],
                "phrase": " ".join(record["caption"][s:e] for s, e in spans),
                "tokens_positive": [list(span) for span in spans],
            }
        )
    return {
        "filename": Path(record["file_name"]).name,
        "height": record["height"],
        "width": record["width"],
        "grounding": {"caption": record["caption"], "regions": regions},
    }


@pytest.mark.parametrize(
    "name, phrase",
    [
        ("Bow_(weapon)", "bow"),
        ("bow_(decorative_ribbons)", "bow"),
        ("Cottontail-Rabbit", "cottontail-rabbit"),
        ("street sign", "street sign"),
        ("  Bell_pepper   leaf ", "bell pepper leaf"),
        ("elevator_car", "elevator car"),
        ("(only brackets)", "(only brackets)"),
    ],
)
def test_names_are_cleaned(name, phrase):
    assert clean_name(name) == phrase


def test_a_path_of_an_mdetr_file_is_a_name(root):
    path = str(root / "mdetr_annotations/final_flickr_separateGT_train.json")
    by_path = datasets.load_datasets(path)
    by_name = datasets.load_datasets("flickr30k_train")
    assert [r["caption"] for r in by_path] == [r["caption"] for r in by_name]
    assert by_path[0]["file_name"].startswith(str(root / "mdetr_annotations"))
