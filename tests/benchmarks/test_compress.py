"""What is kept of the gain with fewer copies: the models that are compared, and the table."""

from types import SimpleNamespace

import compress
from dynamic_dino.config import load_config
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import SoftmaxRouter
from helpers.seeds import fresh_rng
from lib import tables
from lib.detectors import ROOT
from torch import nn


def test_variants_have_fewer_copies_than_the_model_and_their_recipes_say_so():
    model = nn.ModuleList([MoEFeedForward(4, 8, SoftmaxRouter(4, 8, 2))])
    found = list(compress.variants(model, SimpleNamespace(copies=[4, 3, 1])))
    assert found == [("merge", 3), ("prune", 3), ("merge", 1), ("prune", 1), ("dense", None)]
    cfg = load_config(ROOT / "configs/moe_tuning/nano_x16_glyphs.py")
    assert compress.smaller(cfg, 3, 2).model.decoder.layer.ffn.router.num_experts == 6
    dense = compress.smaller(cfg, None, 2).model.decoder.layer.ffn
    assert dense == {"_target_": dense._target_, "dim": 64, "hidden": 64}
    assert cfg.model.decoder.layer.ffn.router.num_experts == 16


def test_table_compares_with_the_control_and_with_all_copies_of_the_same_run():
    rng = fresh_rng()
    runs, control = {}, {}
    for run in ("a", "b"):
        base = rng.uniform(20, 40)
        control[run] = {"val/AP": base, "val/AP50": 90.0}
        runs[run] = {
            name: {"scores": {"val/AP": base + gain}, "ffn_parameters": 0.5}
            for name, gain in (("as it is", 7.0), ("dense", 4.5))
        }
    text = tables.compress({"runs": runs, "control": control})
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "+7.0 ± 0.0 | +0.0 ± 0.0" in rows["as it is"]
    assert "+4.5 ± 0.0 | -2.5 ± 0.0" in rows["dense"] and "0.500" in rows["dense"]
