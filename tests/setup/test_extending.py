"""A router, a backbone, a data set and a protocol of one's own: one file of `toys/` each, and one
override of a recipe (a data set: two). CONTRIBUTING.md shows them."""

import json
from pathlib import Path

import pytest
from dynamic_dino.data.datasets import register_builtin
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.engine.cli import main

ROOT = Path(__file__).parents[2]
TOYS = Path(__file__).parent / "toys"
pytestmark = pytest.mark.slow  # each is a whole run of training and evaluation


@pytest.fixture(scope="module", autouse=True)
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    write_drawn_dataset(root, 4, 96, seed=1, split="train")
    write_drawn_dataset(root, 2, 96, seed=2, split="val")
    register_builtin(root)
    yield
    register_builtin()


OVERRIDES = {
    "router": [
        "model.decoder.layer.ffn.router={_target_:toy_router.ToyRouter,dim:256,num_experts:4}"
    ],
    "backbone": ["model.backbone={_target_:toy_backbone.ToyBackbone,channels:[40,112,320]}"],
    "dataset": [
        "dataloader.train.dataset={_target_:toy_dataset.load,folder:FOLDER}",
        "dataloader.train.mapper.dataset=toy",  # whose names the prompts take
    ],
    "protocol": ["dataloader.evaluator.val.protocol=toy_protocol.PROTOCOL"],
}


@pytest.mark.parametrize("toy", OVERRIDES)
def test_one_file_and_an_override(toy, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOYS))
    recipe = "moe_tuning/nano_x16_drawn.py" if toy == "router" else "pretrain/nano_drawn.py"
    options = [
        f"train.output_dir={tmp_path}",
        "train.init_checkpoint=",
        "train.max_iter=1",
        "train.best_metric=null",
        "dataloader.train.total_batch_size=2",
        *(override.replace("FOLDER", str(tmp_path)) for override in OVERRIDES[toy]),
    ]
    main(["--num-gpus", "0", "--config-file", str(ROOT / "configs" / recipe), *options])
    config = (tmp_path / "config.yaml").read_text()
    assert f"toy_{toy}." in config
    results = json.loads((tmp_path / "results.json").read_text())
    metric = "val/share" if toy == "protocol" else "val/AP50"
    assert 0 <= results[metric] <= 100
