"""The recipes of the photo mixture, on pictures that are drawn here under the names of its sets."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from dynamic_dino.config import load_config
from dynamic_dino.data import datasets
from dynamic_dino.data.builtin import BUILTIN
from dynamic_dino.data.synthetic.drawn import NAMES, draw_image
from dynamic_dino.engine.setup import setup
from dynamic_dino.engine.train import do_train
from helpers.seeds import fresh_rng

RECIPE = Path(__file__).parents[2] / "configs/pretrain/nano_photos.py"
SIZE = 96
COCO_NAMES = [*NAMES, *(f"thing number {i}" for i in range(80 - len(NAMES)))]


def write(root: Path, name: str, rng: np.random.Generator, count: int = 4) -> None:
    file, folder = BUILTIN[name].locate(root)
    names = COCO_NAMES if "coco" in name else NAMES
    images, annotations = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(1, count + 1):
        picture, objects = draw_image(rng, 120)
        image = {"id": i, "file_name": f"{name}_{i}.png"}
        picture.save(folder / image["file_name"])
        images.append(image | {"width": picture.width, "height": picture.height})
        annotations += [
            {"image_id": i, "category_id": label + 1, "bbox": box} for label, box in objects
        ]
    categories = [{"id": i, "name": phrase} for i, phrase in enumerate(names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("datasets"), fresh_rng()
    cfg = load_config(RECIPE)
    for name in [*cfg.data.train, "photos_coco_val", "stamps_val", "stamps_val_real"]:
        write(root, name, rng)
    datasets.register_builtin(root)
    yield root
    datasets.register_builtin()


def small(*overrides: str):
    return load_config(
        RECIPE,
        [f"inference.size={SIZE}", f"model.canvas={SIZE}", "dataloader.train.num_workers=0"]
        + list(overrides),
    )


def test_the_mixture(root):
    """Shares of the samples, lengths of prompts, and what the augmentation makes."""
    cfg = small("dataloader.train.total_batch_size=1800")
    node = {**cfg.dataloader.train, "mapper": lambda record, rng: record["dataset_name"]}
    shares = Counter(next(iter(instantiate(node))))
    for name, weight in zip(cfg.data.train, cfg.data.weights, strict=True):
        assert shares[name] / 1800 == pytest.approx(weight / sum(cfg.data.weights), abs=0.05)

    cfg = small("data.train=[photos_coco_train,stamps_train]", "data.weights=[4,2]")
    samples = list(itertools.chain(*itertools.islice(instantiate(cfg.dataloader.train), 10)))
    lengths = [len(sample["prompt"].phrases) for sample in samples if "coco" in sample["file_name"]]
    assert min(lengths) >= 10 and 40 < max(lengths) <= 80
    sizes = [max(sample["image_size"]) for sample in samples]
    assert max(sizes) == SIZE and min(sizes) < 0.8 * SIZE
    for sample in samples:
        h, w = sample["image_size"]
        boxes = sample["instances"].gt_boxes.tensor
        assert (boxes[:, 2:] - boxes[:, :2] >= 4).all()
        assert (boxes >= 0).all() and (boxes <= torch.tensor([w, h, w, h])).all()


@pytest.mark.slow
def test_a_step_of_all_that_may_train(root, tmp_path):
    """With the backbone, by one override, from the shipped weights, which leave it out."""
    cfg = small(
        "model.backbone.frozen=False",
        f"train.output_dir={tmp_path / 'run'}",
        "train.device=cpu",
        "train.log_period=1",
        "train.max_iter=2",
        "train.amp.enabled=false",  # slow on a CPU
        "dataloader.train.total_batch_size=2",
    )
    setup(cfg)
    start = instantiate(cfg.model.backbone).state_dict()
    trained = do_train(cfg).backbone.state_dict()
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    norms = {name for name in start if "running" in name or "bn" in name}
    assert changed == start.keys() - norms, "batch norms stay as they are"
    change = max((trained[name] - start[name]).abs().max().item() for name in changed)
    assert 0 < change <= 2.1 * 0.1 * cfg.optimizer.lr, "Adam's steps, at a tenth of the rate"
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.json").read_text().splitlines()]
    assert all(np.isfinite(row["total_loss"]) for row in rows if "total_loss" in row)
    results = json.loads((tmp_path / "run/results.json").read_text())
    for test in ("coco", "coco_present", "val", "val_real"):
        assert f"{test}/AP50" in results


def test_prompts_of_the_tests(root):
    """coco asks for all names, coco_present for those that a photo shows, and no other."""
    tests = small().dataloader.test
    for sample in itertools.chain(*instantiate(tests.coco)):
        assert list(sample["prompt"].phrases) == COCO_NAMES
    for sample in itertools.chain(*instantiate(tests.coco_present)):
        classes = {int(c) for c in sample["instances"].gt_classes}
        assert classes == set(range(len(sample["prompt"].phrases)))


@pytest.mark.parametrize("family", ["moe_tuning", "himoe"])
def test_the_control_trains_the_same_parts_for_as_long(family):
    tuned = load_config(RECIPE.parents[1] / f"{family}/nano_x16_photos.py")
    control = load_config(f"{RECIPE}:control")
    for key in ("max_iter", "init_checkpoint", "eval_period", "clip_grad", "seed"):
        assert control.train[key] == tuned.train[key]
    assert control.optimizer == tuned.optimizer and control.lr_multiplier == tuned.lr_multiplier
    assert control.dataloader == tuned.dataloader
    parts = [name for name in tuned.train.trainable if ".ffn." not in name]
    assert set(parts) | {"decoder.layers.*.ffn.*"} == set(control.train.trainable)
