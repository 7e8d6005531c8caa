"""Learning rates, decays and freezing by name patterns."""

import pytest
import torch
from dynamic_dino.engine.optim import get_param_groups, match_parameters
from dynamic_dino.engine.trainable import parameter_table, set_train_mode, set_trainable
from torch import nn


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.rand(4, 3, 2)), nn.Parameter(torch.rand(4, 3))
        self.scale = nn.Parameter(torch.rand(()))


def build() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "backbone": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)),
            "decoder": nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4), Experts()]),
        }
    )


def settings(model: nn.Module, groups: list[dict]) -> dict[str, tuple]:
    names = {p: name for name, p in model.named_parameters()}
    found = [(names[p], (g["lr"], g.get("weight_decay"))) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


def test_groups():
    model = build()
    model["backbone"][0].bias.requires_grad_(False)
    factors = {"backbone.*": 0.1, "backbone.1.*": 0.01, "decoder.2.*": 2}
    groups = get_param_groups(model, 1.0, factors)
    assert settings(model, groups) == {
        "backbone.0.weight": (0.1, None),
        "backbone.1.weight": (0.01, 0.0),
        "backbone.1.bias": (0.01, 0.0),
        "decoder.0.weight": (1.0, None),
        "decoder.0.bias": (1.0, 0.0),
        "decoder.1.weight": (1.0, 0.0),
        "decoder.1.bias": (1.0, 0.0),
        "decoder.2.w1": (2.0, None),
        "decoder.2.b1": (2.0, 0.0),
        "decoder.2.scale": (2.0, 0.0),
    }
    assert len(groups) == 6
    everything_decays = get_param_groups(model, 1.0, no_weight_decay_norm=False)
    assert set(settings(model, everything_decays).values()) == {(1.0, None)}


def test_a_shared_parameter_is_grouped_once():
    model = build()
    model["tied"] = model["decoder"][0]
    assert len(settings(model, get_param_groups(model, 1.0))) == 11


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("decodr.*", "decoder"),
        ("decoder.2.w2", "decoder.2.w1"),
        ("bckbone.1.bias", "backbone.1.bias"),
    ],
)
def test_pattern_without_a_match(pattern, near):
    with pytest.raises(
        ValueError,
        match=f"train.trainable: pattern {pattern!r} matches no parameter.*{near}".replace(
            "*'", r"\*'"
        ),
    ):
        match_parameters(build(), pattern, "train.trainable")
    with pytest.raises(ValueError, match="matches no parameter"):
        get_param_groups(build(), 1.0, {pattern: 0.1})
    with pytest.raises(ValueError, match="matches no parameter"):
        set_trainable(build(), ["decoder.*", pattern])


def test_set_trainable():
    model = build()
    model["decoder"][0].weight.requires_grad_(False)
    set_trainable(model, None)
    assert sum(p.requires_grad for p in model.parameters()) == 10
    set_trainable(model, ["decoder.0.*", "*.b1"])
    chosen = [name for name, p in model.named_parameters() if p.requires_grad]
    assert chosen == ["decoder.0.bias", "decoder.2.b1"], "the model's own freezing stands"
    with pytest.raises(ValueError, match="nothing would be trained"):
        set_trainable(model, ["decoder.0.weight"])


def test_nothing_to_optimize():
    with pytest.raises(ValueError, match="no parameter is trainable"):
        get_param_groups(build().requires_grad_(False), 1.0)


def test_train_mode_spares_frozen_modules():
    model = build().eval()
    set_trainable(model, ["decoder.*"])
    set_train_mode(model)
    assert model.training and model["decoder"][1].training
    assert not any(m.training for m in model["backbone"].modules())


def test_parameter_table():
    counts = {"total": 222_000_000, "trainable": 22_000_000, "active": 1_500}
    rows = [line.split() for line in parameter_table(counts).split("\n")]
    assert rows[1] == ["total", "222.000", "M"] and rows[3] == ["active", "0.002", "M"]
    assert rows[4] == ["frozen", "200.000", "M"]
