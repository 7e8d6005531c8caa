"""A few iterations of nano on miniatures of the paper's mixture, and on one's own data."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import LazyConfig
from dynamic_dino.config import ConfigError, load_config
from dynamic_dino.data import datasets
from dynamic_dino.data.convert import convert_dataset
from dynamic_dino.engine.setup import setup
from dynamic_dino.engine.train import do_train
from helpers import formats, miniatures
from helpers.seeds import fresh_rng

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    miniatures.write_all(root, seed=int(fresh_rng().integers(1 << 30)))
    datasets.register_builtin(root)
    yield root
    datasets.register_builtin()


def train(cfg, output: Path) -> list[dict]:
    setup(cfg)
    do_train(cfg)
    rows = [json.loads(row) for row in (output / "metrics.json").read_text().splitlines()]
    return [row for row in rows if "total_loss" in row]


def options(output: Path) -> list[str]:
    return [
        f"train.output_dir={output}",
        "train.device=cpu",
        "train.log_period=1",
        "train.max_iter=3",
        "train.amp.enabled=false",  # slow on a CPU
    ]


@pytest.mark.slow
def test_nano_trains_on_the_mixture(root, tmp_path):
    cfg = load_config(CONFIGS / "pretrain/nano_drawn.py", options(tmp_path / "run"))
    paper = LazyConfig.load(str(CONFIGS / "common/data/paper_mixture.py")).dataloader
    cfg.dataloader.train, cfg.dataloader.test = paper.train, paper.test
    cfg.dataloader.evaluator = paper.evaluator
    cfg.train.best_metric = "coco/AP"
    cfg.dataloader.train.num_workers = cfg.dataloader.test.coco.num_workers = 0
    cfg.dataloader.train.total_batch_size = 4
    cfg.dataloader.train.weights = [1, 1, 1, 1]
    cfg.dataloader.train.mapper.phrase_prompts = 0.5
    rows = train(cfg, tmp_path / "run")
    assert len(rows) == 3 and all(np.isfinite(row["total_loss"]) for row in rows)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert "coco/AP50" in results


@pytest.mark.slow
def test_a_closed_set_trains_on_coco(root, tmp_path):
    """The data of the COCO recipes, the classes of the file."""
    small = [
        "model.text_encoder.names=coco_2017_train",
        "model.enhancer.num_layers=1",
        "model.decoder.num_layers=1",
    ]
    recipe = CONFIGS / "pretrain/dino_nano_drawn.py"
    cfg = load_config(recipe, [*options(tmp_path / "run"), *small, "train.max_iter=2"])
    cfg.dataloader = LazyConfig.load(str(CONFIGS / "common/data/coco.py")).dataloader
    cfg.dataloader.train.num_workers = cfg.dataloader.test.coco.num_workers = 0
    cfg.dataloader.train.total_batch_size = 2
    cfg.dataloader.train.mapper.augmentations.update(scales=[64, 96], max_size=128)
    cfg.train.best_metric = "coco/AP"
    rows = train(cfg, tmp_path / "run")
    assert len(rows) == 2 and all(np.isfinite(row["total_loss"]) for row in rows)
    assert "coco/AP50" in json.loads((tmp_path / "run/results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detection", "grounding"])
def test_own_data_with_others_mixed_in(root, tmp_path, kind, monkeypatch):
    """Detection: COCO JSON; grounding: ODVG JSONL; with two data sets of the paper beside it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    if kind == "detection":
        own, images = root / "coco/annotations/instances_train2017.json", "coco/train2017"
    else:
        own, images = tmp_path / "own.jsonl", "flickr30k/flickr30k_images"
        convert_dataset("flickr30k_train", own, "odvg")
    val = root / "coco/annotations/instances_val2017.json"
    cfg = load_config(
        CONFIGS / "moe_tuning/nano_x16_custom.py",
        [
            *options(tmp_path / "run"),
            f"data.train_json={own}",
            f"data.train_images={root / images}",
            f"data.val_json={val}",
            f"data.val_images={root / 'coco/val2017'}",
            "data.extra=[objects365_v1_train,gqa_train]",
            "data.weights=[2,1,1]",
            "dataloader.train.total_batch_size=2",
            "dataloader.train.num_workers=0",
            "inference.size=128",
            "model.canvas=128",
        ],
    )
    rows = train(cfg, tmp_path / "run")
    assert len(rows) == 3 and all(np.isfinite(row["total_loss"]) for row in rows)
    assert "val/AP50" in json.loads((tmp_path / "run/results.json").read_text())


def test_a_mistake_in_the_data_ends_with_its_message(root, tmp_path):
    with pytest.raises(ConfigError, match=r"own\.jsonl, line 1.*(a phrase|'phrase'|truncated)"):
        file = tmp_path / "own.jsonl"
        file.write_text('{"filename": "a.jpg", "height": 4, "wid')
        cfg = load_config(
            CONFIGS / "moe_tuning/nano_x16_custom.py",
            [
                *options(tmp_path / "run"),
                f"data.train_json={file}",
                f"data.val_json={file}",
                f"data.train_images={tmp_path}",
            ],
        )
        train(cfg, tmp_path / "run")


@pytest.mark.parametrize("writer", ["voc", "ultralytics"])
def test_one_folder_in_a_tools_format_is_enough(tmp_path, writer):
    """Its parts are drawn; the validation part is scored in the ids of its names."""
    photos = formats.photos(fresh_rng(), 10)
    source = formats.WRITERS[writer](tmp_path / "mine", photos)
    cfg = load_config(
        CONFIGS / "moe_tuning/nano_x16_custom.py",
        [
            *options(tmp_path / "run"),
            f"data.source={source}",
            "dataloader.train.total_batch_size=2",
            "dataloader.train.num_workers=0",
            "inference.size=128",
            "model.canvas=128",
        ],
    )
    rows = train(cfg, tmp_path / "run")
    assert len(rows) == 3 and all(np.isfinite(row["total_loss"]) for row in rows)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert "val/AP50" in results
    log = (tmp_path / "run/log.txt").read_text().splitlines()
    assert any("8 images" in line and "20% of the images drawn" in line for line in log)
