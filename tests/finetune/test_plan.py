"""What is chosen by machine and number of photos, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from detectron2.config import instantiate
from dynamic_dino.config import ConfigError
from dynamic_dino.engine.trainable import set_trainable
from dynamic_dino.finetune import cli, plan
from dynamic_dino.finetune.rule import LEAST, iterations_for
from dynamic_dino.serving.shipped import SHIPPED_MODELS
from helpers import formats, twins
from helpers.seeds import examples, fresh_rng
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


@settings(max_examples=examples(30))
@given(st.integers(1, 10**6), st.integers(1, 32))
def test_longer_for_more_photos_but_each_comes_less_often(photos, batch):
    one, four = iterations_for(photos, batch), iterations_for(4 * photos, batch)
    assert isinstance(one, int) and LEAST <= one <= four <= 2 * one + 10
    assert four / (4 * photos) <= one / photos
    assert iterations_for(photos, 2 * batch) <= one


def test_the_rules_examples_are_those_of_its_text():
    for photos, times in ((10, 38), (2000, 2.7)):
        assert f"{photos:,}" in plan.iterations_for.__globals__["__doc__"]
        assert 4 * iterations_for(photos) / photos == pytest.approx(times, rel=0.06)


def test_a_dense_shipped_model_on_a_cpu_and_public_weights_on_a_gpu(monkeypatch):
    name = plan.default_start("cpu")
    assert SHIPPED_MODELS[name].config.startswith("pretrain/")
    assert plan.default_start("cuda") == plan.PUBLIC
    monkeypatch.setattr(plan, "DEFAULT_MODEL", "newer")
    monkeypatch.setitem(plan.SHIPPED_MODELS, "newer", SHIPPED_MODELS[name])
    assert plan.default_start("cpu") == "newer"
    for wrong, said in (("nano-dens", "nano-dense"), ("hf:nobody/nothing", f"--start {name}")):
        monkeypatch.setattr(plan, "DEFAULT_MODEL", name)
        with pytest.raises(ConfigError, match=said):
            plan.find_start(wrong, "cpu")


@pytest.fixture(scope="module")
def start():
    return plan.find_start(None, "cpu")


def recipe(start, kind, *overrides, **options):
    return plan.recipe_for(start, kind, "mine", Path("out"), overrides=overrides, **options)


def test_a_control_trains_what_its_mixture_trains(start):
    tuned, x16, control = (recipe(start, kind, photos=160) for kind in plan.TITLES)
    ffn, dense = x16.model.decoder.layer.ffn, control.model.decoder.layer.ffn
    assert (ffn.dim, ffn.hidden, ffn.router.num_experts) == (dense.dim, dense.hidden, 16)
    assert tuned.model == control.model and not tuned.model.criterion.router_losses
    assert tuned.train.trainable is None and x16.model.criterion.router_losses
    mine, theirs = ({p for p in cfg.train.trainable if ".ffn." not in p} for cfg in (x16, control))
    assert mine == theirs and "decoder.layers.*.ffn.*" in control.train.trainable
    for cfg in (x16, control):
        assert cfg.train.max_iter == tuned.train.max_iter == iterations_for(160)
        assert cfg.optimizer.lr == tuned.optimizer.lr
        assert cfg.dataloader.train.total_batch_size == tuned.dataloader.train.total_batch_size


def test_overrides_count_last_and_the_cache_heeds_them(start):
    few = recipe(start, "tuned", photos=5)
    many = recipe(start, "tuned", "dataloader.train.total_batch_size=8", photos=400)
    assert few.train.max_iter == 70 and many.train.max_iter == 300
    set_by_hand = recipe(start, "tuned", "train.max_iter=7", "optimizer.lr=1.0", photos=5)
    assert (set_by_hand.train.max_iter, set_by_hand.optimizer.lr) == (7, 1.0)
    assert plan.caching_pays(few, 5) and not plan.caching_pays(few, 10_000)
    for override in (
        "model.backbone.frozen=false",
        "dataloader.train.mapper.augmentations=[{_target_:dynamic_dino.data.mapper.color_jitter}]",
    ):
        assert not plan.caching_pays(recipe(start, "tuned", override, photos=5), 5)


def test_public_weights_have_recipes_of_every_kind(tmp_path):
    config_class, _ = twins.FAMILIES["gdino"]
    swin = transformers.SwinConfig(**twins.SWIN, out_indices=[2, 3, 4])
    bert = transformers.BertConfig(**twins.BERT)
    config_class(backbone_config=swin, text_config=bert, **twins.SIZES).save_pretrained(tmp_path)
    public = plan.find_start(f"hf:{tmp_path}", "cpu")
    trained = {}
    for kind in plan.TITLES:
        cfg = recipe(public, kind, photos=5, device="cpu")
        assert cfg.train.init_checkpoint == f"hf:{tmp_path}"
        with torch.device("meta"):
            model = instantiate(cfg.model)
        set_trainable(model, cfg.train.trainable)
        trained[kind] = {n for n, p in model.named_parameters() if p.requires_grad}
        assert not any(name.startswith("text_encoder.body.") for name in trained[kind])
        assert not plan.caching_pays(cfg, 5), "the backbone trains"
    assert any(name.startswith("backbone.") for name in trained["tuned"])
    parts = [{n for n in trained[kind] if ".ffn." not in n} for kind in ("x16", "control")]
    assert parts[0] == parts[1] and not trained["control"] - trained["tuned"]
    assert any(".ffn.router." in name for name in trained["x16"])


def no_boxes(path: Path) -> str:
    photos = formats.photos(fresh_rng(), 5)
    for photo in photos:
        photo.boxes.clear()
    photos[0].boxes.append(("red panda", (1.0, 1.0, 9.0, 9.0)))  # a format needs a name
    source = formats.WRITERS["voc"](path, photos[:1])
    (xml,) = source.rglob("*.xml")
    xml.write_text(xml.read_text().replace("xmax>9", "xmax>0"))
    return str(source)


def one_photo(path: Path) -> str:
    return str(formats.WRITERS["voc"](path, formats.photos(fresh_rng(), 2)[:1]))


def empty(path: Path) -> str:
    path.mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "width": 9, "height": 9} for i in range(5)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cup"}]}
    (path / "a.json").write_text(json.dumps(content))
    for image in images:
        Image.new("RGB", (9, 9)).save(path / image["file_name"])
    return str(path / "a.json")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (no_boxes, "--bad-boxes drop"),
        (one_photo, "a split needs two"),
        (empty, "none of its 4 images has a box"),
        (str, "no file or folder"),
    ],
)
def test_data_that_cannot_be_tuned_on_are_refused_with_the_remedy(write, said, tmp_path, capsys):
    data = write(tmp_path / "mine")
    assert cli.main([data, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert said in told.err + told.out and "Traceback" not in told.err
    assert not (tmp_path / "out").exists(), "nothing is written before the data are good"


def test_options_that_make_no_sense_together(capsys):
    for words in (["mine", "--control"], ["mine", "--iterations", "0"], ["--experts"]):
        with pytest.raises(SystemExit):
            cli.main(words)
    assert "control of --experts" in capsys.readouterr().err
