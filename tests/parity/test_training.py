"""Fine-tuning and MoE-Tuning that start from a directory of transformers, by their recipes."""

import json
import shutil

import numpy as np
import pytest
import torch
from dynamic_dino.checkpoint.transformers_config import detector_config, read_config
from dynamic_dino.config import load_config
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.engine.setup import setup
from dynamic_dino.engine.train import do_train
from dynamic_dino.files import configs_folder
from helpers.seeds import fresh_rng


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return write_drawn_dataset(root, 4, 64, seed=int(fresh_rng().integers(1 << 30)))


def load(recipe: str, folder, drawn, output, *options: str):
    """The recipe with the model of the directory, and a few drawn shapes as one's own data."""
    overrides = [
        f"data.train_json={drawn}",
        f"data.train_images={drawn.parents[1] / 'train'}",
        f"data.val_json={drawn}",
        f"data.val_images={drawn.parents[1] / 'train'}",
        f"train.output_dir={output}",
        "train.device=cpu",
        "train.max_iter=2",
        "train.log_period=1",
        "train.eval_period=0",
        "train.checkpointer.period=1",
        "dataloader.train.num_workers=0",
        "inference.size=[64,80]",
        *options,
    ]
    cfg = load_config(configs_folder() / recipe, overrides)
    ffn, cfg.model = cfg.model.decoder.layer.ffn, detector_config(read_config(folder)).model
    cfg.model.text_encoder.frozen = True
    if "router" in ffn:
        dense = cfg.model.decoder.layer.ffn
        ffn.update(dim=dense.dim, hidden=dense.hidden)
        ffn.router.dim = dense.dim
        cfg.model.decoder.layer.ffn = ffn
    setup(cfg)
    return cfg


def losses(output) -> list[float]:
    rows = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return [row["total_loss"] for row in rows if "total_loss" in row]


@pytest.mark.slow
def test_from_public_weights_to_experts(_twins, drawn, tmp_path):
    """Tuned, stopped and resumed to the same numbers, without the directory; then MoE-tuned."""
    folder = shutil.copytree(_twins["mm_gdino"].folder, tmp_path / "public")
    init, whole, stopped = f"train.init_checkpoint=hf:{folder}", tmp_path / "a", tmp_path / "b"
    recipe = "finetune/mm_gdino_tiny_custom.py"
    tuned = do_train(load(recipe, folder, drawn, whole, init))
    expected = losses(whole)
    assert len(expected) == 2 and np.isfinite(expected).all()
    scores = json.loads((whole / "results.json").read_text())
    assert "val/AP" in scores

    stopped.mkdir()
    shutil.copy(whole / "model_0000000.pth", stopped)
    (stopped / "last_checkpoint").write_text("model_0000000.pth")
    cfg = load(recipe, folder, drawn, stopped, init)
    shutil.rmtree(folder)
    resumed = do_train(cfg, resume=True)
    assert losses(stopped) == expected
    frozen = _twins["mm_gdino"].ours.state_dict()
    for name, value in tuned.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
        if name.startswith("text_encoder.body."):
            assert torch.equal(frozen[name], value)

    output = tmp_path / "moe"
    init = f"train.init_checkpoint={whole / 'model_final.pth'}"
    folder = _twins["mm_gdino"].folder
    cfg = load("moe_tuning/gdino_tiny_x16.py:x4", folder, drawn, output, init, "train.max_iter=1")
    moe = do_train(cfg)
    assert len(losses(output)) == 1 and np.isfinite(losses(output)).all()
    trained = {name for name, p in moe.named_parameters() if p.requires_grad}
    assert any(".experts." in name for name in trained)
    for name, value in tuned.state_dict().items():
        if name in moe.state_dict() and name not in trained:
            assert torch.equal(moe.state_dict()[name], value)
