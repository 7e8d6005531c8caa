import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from dynamic_dino.config import ConfigError, load_config
from dynamic_dino.data import (
    TestMapper,
    TrainMapper,
    build_train_loader,
    color_jitter,
    datasets,
    load_datasets,
)
from dynamic_dino.data.feature_cache import (
    FeatureCache,
    build_feature_cache,
    cache_features,
    module_fingerprint,
)
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.engine.evaluate import do_test
from dynamic_dino.engine.train import do_train
from helpers.seeds import fresh_rng
from omegaconf import OmegaConf
from torch import nn

CANVAS = 96
CONFIGS = Path(__file__).parents[2] / "configs"


class Tower(nn.Module):
    """A small backbone on the padded canvas, strides 8 and 32."""

    def __init__(self, canvas=CANVAS):
        super().__init__()
        self.canvas = canvas
        self.backbone = nn.ModuleDict(
            {"p3": nn.Conv2d(3, 4, 8, stride=8), "p5": nn.Conv2d(3, 6, 32, stride=32)}
        )
        self.calls = 0

    def extract_features(self, images):
        self.calls += 1
        canvas = torch.zeros(len(images), 3, self.canvas, self.canvas)
        for row, image in zip(canvas, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image / 255
        return {level: conv(canvas) for level, conv in self.backbone.items()}


class Mirrorable(Tower):
    """Box filters: what they see of a mirrored image is the mirrored of what they see."""

    def __init__(self):
        super().__init__()
        for conv in self.backbone.values():
            nn.init.constant_(conv.weight, 1 / conv.weight[0].numel())


@pytest.fixture
def records(tmp_path):
    file = write_drawn_dataset(tmp_path, 7, 128, seed=int(fresh_rng().integers(1000)))
    datasets.register_coco_json("test_cache", file, tmp_path / "drawn/train")
    found = load_datasets("test_cache")
    assert len(found) == 7
    return found


def test_cached_equals_computed(records, tmp_path):
    tower = Tower()
    cache = build_feature_cache(
        tower.extract_features, records, tmp_path / "c", canvas=CANVAS, batch_size=3
    )
    cached, plain = (
        TestMapper("test_cache", CANVAS, features=cache),
        TestMapper("test_cache", CANVAS),
    )
    for record in records:
        one, two = cached(record), plain(record)
        expected = tower.extract_features([two["image"]])
        assert list(one["features"]) == ["p3", "p5"] and "image" not in one
        for level, x in one["features"].items():
            assert x.dtype == torch.float16
            torch.testing.assert_close(x.float(), expected[level][0], rtol=1e-3, atol=1e-3)
        assert one["image_size"] == two["image_size"] and one["prompt"] == two["prompt"]
        assert torch.equal(one["instances"].gt_boxes.tensor, two["instances"].gt_boxes.tensor)


@pytest.mark.parametrize("flips", ["mirror", "store"])
def test_training_on_the_cache_is_training_on_the_images(records, tmp_path, flips):
    """Features, boxes and prompt of a flipped sample are those of the flipped image."""
    tower = Mirrorable() if flips == "mirror" else Tower()
    cache = build_feature_cache(
        tower.extract_features, records, tmp_path / "c", canvas=CANVAS, flips=flips
    )
    cached = TrainMapper("test_cache", CANVAS, max_phrases=4, features=cache)
    plain = TrainMapper("test_cache", CANVAS, max_phrases=4)
    checked, flipped = 0, 0
    for record, seed in itertools.product(records, range(6)):
        one, two = (mapper(record, np.random.default_rng(seed)) for mapper in (cached, plain))
        if flips == "mirror" and one["image_size"][1] % 32:
            never = TrainMapper("test_cache", CANVAS, max_phrases=4, flip=0.0)
            two = never(record, np.random.default_rng(seed))  # can't be mirrored exactly
        expected = tower.extract_features([two["image"]])
        for level, x in one["features"].items():
            torch.testing.assert_close(x.float(), expected[level][0], rtol=2e-3, atol=2e-3)
        assert torch.equal(one["instances"].gt_boxes.tensor, two["instances"].gt_boxes.tensor)
        upright = TestMapper("test_cache", CANVAS)(record)["image"]
        flipped += not torch.equal(two["image"], upright)
        checked += 1
    assert 0 < flipped < checked


def test_through_the_loader_and_its_workers(records, tmp_path):
    cache = build_feature_cache(Tower().extract_features, records, tmp_path / "c", canvas=CANVAS)
    cache.load(records[0])
    assert len(pickle.dumps(cache)) < 20_000  # no copy of the arrays
    mapper = TrainMapper("test_cache", CANVAS, max_phrases=4, features=cache)
    runs = [
        list(itertools.islice(build_train_loader(records, mapper, 4, num_workers=n), 3))
        for n in (0, 2)
    ]
    for x, y in zip(*map(itertools.chain.from_iterable, runs), strict=True):
        assert all(torch.equal(x["features"][k], y["features"][k]) for k in ("p3", "p5"))


def test_an_interrupted_build_goes_on(records, tmp_path):
    tower = Tower()

    def interrupted(images):
        if len(images) > 1 and tower.calls == 3:
            raise KeyboardInterrupt
        return tower.extract_features(images)

    options = {"canvas": CANVAS, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        build_feature_cache(interrupted, records, tmp_path / "c", **options)
    with pytest.raises(ValueError, match="is unfinished .* run the same caching command again"):
        FeatureCache(tmp_path / "c")
    done = np.load(tmp_path / "c/done.npy")
    done[:4] = True  # as after a flush; their features must not be computed again
    np.save(tmp_path / "c/done.npy", done)
    tower.calls = 10
    cache = build_feature_cache(tower.extract_features, records, tmp_path / "c", **options)
    assert tower.calls == 12  # the last 3 of 7 images in batches of 2
    for record in records:
        image = TestMapper("test_cache", CANVAS)(record)["image"]
        expected = tower.extract_features([image])["p3"][0]
        torch.testing.assert_close(cache.load(record)["p3"].float(), expected, rtol=1e-3, atol=1e-3)
    calls = tower.calls
    build_feature_cache(tower.extract_features, records, tmp_path / "c", **options)
    assert tower.calls == calls  # nothing left to do


def test_a_cache_of_something_else_is_not_used(records, tmp_path):
    root, extract = tmp_path / "c", Tower().extract_features
    build_feature_cache(extract, records, root, canvas=CANVAS, backbone="one")
    for changed in (
        {"backbone": "two"},
        {"canvas": 64},
        {"flips": "store"},
        {"records": records[:-1]},
    ):
        options = {"records": records, "canvas": CANVAS, "backbone": "one", **changed}
        field = next(iter(changed)).replace("records", "files")
        with pytest.raises(ValueError, match=f"'{field}' differs.*overwrite=True"):
            build_feature_cache(extract, root=root, **options)
    cache = build_feature_cache(
        extract, records[:-1], root, canvas=CANVAS, backbone="two", overwrite=True
    )
    assert len(cache) == 6
    with pytest.raises(KeyError, match="no features of"):
        cache.load(records[-1])
    with pytest.raises(ValueError, match="size is 64, but .* cached at 96"):
        TrainMapper("test_cache", 64, features=cache)
    with pytest.raises(ValueError, match="can't be augmented"):
        TrainMapper("test_cache", CANVAS, features=cache, augmentations=[color_jitter()])


def test_a_changed_image_is_noticed(records, tmp_path):
    cache = build_feature_cache(Tower().extract_features, records, tmp_path / "c", canvas=CANVAS)
    with open(records[2]["file_name"], "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="has changed since"):
        cache.load(records[2])


def test_weights_of_the_backbone(records, tmp_path):
    tower = Tower()
    cache = build_feature_cache(
        tower.extract_features,
        records,
        tmp_path / "c",
        canvas=CANVAS,
        backbone=module_fingerprint(tower.backbone),
    )
    cache.check_backbone(module_fingerprint(tower.backbone))
    with torch.no_grad():
        tower.backbone["p5"].bias[0] += 1e-6
    with pytest.raises(ValueError, match="a backbone with other weights"):
        cache.check_backbone(module_fingerprint(tower.backbone))


def test_features_beyond_float16(records, tmp_path):
    def huge(images):
        return {"p3": torch.full((len(images), 1, 2, 2), 1e6)}

    with pytest.raises(ValueError, match="'p3'.*not finite in float16"):
        build_feature_cache(huge, records, tmp_path / "c", canvas=CANVAS)


def test_missing_damaged_and_unwritable(records, tmp_path):
    with pytest.raises(FileNotFoundError, match="no feature cache in .*make it with"):
        FeatureCache(tmp_path / "none")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/manifest.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON"):
        FeatureCache(tmp_path / "c")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="can't write the feature cache"):
        build_feature_cache(Tower().extract_features, records, tmp_path / "file/c", canvas=CANVAS)


def test_the_cache_that_a_config_asks_for(records, tmp_path):
    dataset = L(load_datasets)(names="test_cache")
    features = str(tmp_path / "c")
    mapper = L(TrainMapper)(dataset="test_cache", size=CANVAS, features=features)
    test = L(TestMapper)(dataset="test_cache", size=CANVAS, features=features)
    cfg = OmegaConf.create({"dataloader": {"train": {}, "test": {"val": {}}}})
    cfg.dataloader.train = L(build_train_loader)(dataset=dataset, mapper=mapper, total_batch_size=2)
    cfg.dataloader.test.val = L(build_train_loader)(dataset=dataset, mapper=test)
    tower = Tower()
    (cache,) = cache_features(cfg, tower, batch_size=4)
    assert len(cache) == 7
    cache.check_backbone(module_fingerprint(tower.backbone))
    assert "features" in next(iter(instantiate(cfg.dataloader.train)))[0]
    tower.canvas = 64
    with pytest.raises(ValueError, match="model.canvas is 64"):
        cache_features(cfg, tower)
    cfg.dataloader.train.mapper.features = None
    cfg.dataloader.test.val.mapper.features = None
    with pytest.raises(ValueError, match="no mapper of this config has features"):
        cache_features(cfg, tower)


def test_a_run_with_another_backbone_is_refused(records, tmp_path):
    """In training and in evaluation, before the first batch, with the cache's name."""
    cache = str(tmp_path / "features of this backbone")
    cfg = load_config(
        CONFIGS / "pretrain/nano_drawn.py",
        [
            f"train.output_dir={tmp_path / 'run'}",
            "train.device=cpu",
            "train.max_iter=1",
            "model.backbone.weights=null",
            f"model.canvas={CANVAS}",
        ],
    )
    dataset = L(load_datasets)(names="test_cache")
    train, test = cfg.dataloader.train, cfg.dataloader.test.val
    train.num_workers, train.total_batch_size = 0, 2
    for loader in (train, test):
        loader.dataset = dataset
        loader.mapper.update(dataset="test_cache", size=CANVAS, features=cache)
    cfg.dataloader.evaluator.val.dataset_name = "test_cache"
    model = instantiate(cfg.model)
    cache_features(cfg, model)
    with torch.no_grad():  # an unrelated change is none of the cache's business
        next(model.enhancer.parameters()).add_(1)
    assert "val/AP" in do_test(cfg, model)
    other = instantiate(cfg.model)  # drawn at random, as there are no weights
    refusal = "features of this backbone.*other weights than this model's.*cache the features again"
    with pytest.raises(ConfigError, match=refusal):
        do_test(cfg, other)
    with pytest.raises(ConfigError, match=refusal):
        do_train(cfg)
