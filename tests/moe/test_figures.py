"""Figures of a run show its numbers."""

import json

import numpy as np
import pytest
import torch
from dynamic_dino.moe import figures
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routing import Routing
from dynamic_dino.moe.statistics import RoutingStatistics
from dynamic_dino.moe.top_any import TopAnyRouter
from torch import nn


def evaluated():
    """Rows of an evaluation with 2 layers of 5 slots, 4 of them active."""
    statistics = RoutingStatistics()
    active = torch.tensor([True, True, False, True, True])
    routings = []
    for _ in range(2):
        ids = torch.stack([torch.randperm(5) for _ in range(30)])
        ids[(torch.rand(30, 5) < 0.5) | (ids == 2)] = -1
        routings.append(Routing(ids.int(), ids / 1.0, torch.rand(30, 5), active=active, parts=1))
    statistics.update(routings)
    return routings, statistics.summary()


def test_what_an_evaluation_shows():
    routings, layers = evaluated()
    bars, lines = figures.experts_per_token(layers).axes
    for i, routing in enumerate(routings):
        taken = (routing.expert_ids >= 0).sum(1)
        assert bars.patches[i].get_height() == pytest.approx(taken.float().mean().item())
        share = 100 * torch.bincount(taken, minlength=6) / 30
        assert lines.lines[i].get_ydata() == pytest.approx(share.tolist())
    [axis] = figures.activation_frequency(layers).axes
    for i, routing in enumerate(routings):
        frequency = [(routing.expert_ids == e).any(1).float().mean().item() for e in range(5)]
        assert axis.collections[i].get_sizes() / 300 == pytest.approx(frequency)


def test_what_a_checkpoint_shows():
    layers = nn.ModuleList(MoEFeedForward(6, 4, router=TopAnyRouter(6, 5, 3)) for _ in range(2))
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    routers = figures.routers_of(layers.state_dict())
    assert len(routers) == 2
    weight = layers[1].router.weight[:3].detach()
    shown = figures.similarity(routers).axes[1].images[0].get_array()
    expected = nn.functional.cosine_similarity(weight[:, None], weight[None], dim=-1)
    np.testing.assert_allclose(shown, expected, atol=1e-5)
    heights = [bar.get_height() for bar in figures.thresholds(routers).axes[1].patches]
    assert heights == pytest.approx(layers[1].router.thresholds[:3].tolist())


def test_what_the_log_shows():
    rows = [
        {"iteration": i, "moe/layer0/active_experts": 4 + i, "val/routing/layer0/active_experts": 9}
        for i in range(3)
    ]
    axes = figures.over_training([*rows, {"iteration": 3}]).axes
    assert [len(axis.lines) for axis in axes] == [1, 0, 0]
    assert axes[0].lines[0].get_xydata().tolist() == [[0, 4], [1, 5], [2, 6]]
    assert figures.over_training([{"iteration": 0, "lr": 1}]) is None


def test_command(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "evaluation/val").mkdir(parents=True)
    (run / "evaluation/val/results.json").write_text(json.dumps({"routing": evaluated()[1]}))
    model = nn.ModuleDict({"ffn": MoEFeedForward(6, 4, router=TopAnyRouter(6, 5))})
    torch.save({"model": model.state_dict()}, run / "model_final.pth")
    (run / "last_checkpoint").write_text("model_final.pth")
    rows = [{"iteration": i, "moe/layer0/active_experts": 4 + i} for i in range(3)]
    (run / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    figures.main([str(run)])
    names = ["experts_per_token_val", "activation_frequency_val", "similarity", "thresholds"]
    files = [run / f"figures/{name}.png" for name in [*names, "over_training"]]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    assert all(file.stat().st_size > 1000 for file in files)

    with pytest.raises(SystemExit):
        figures.main([str(tmp_path)])
    assert "neither an evaluation of a mixture of experts" in capsys.readouterr().err
