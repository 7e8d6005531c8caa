"""The decoder's FFNs alone: equal at the start, and what trains."""

import copy

import name_memory
import numpy as np
import pytest
import torch
from dynamic_dino.moe.layer import MoEFeedForward
from helpers.seeds import fresh_rng
from name_memory import (
    BASE,
    Glyphs,
    Memory,
    dense,
    score,
    search_rows,
    start_from_clusters,
    train,
    tuned,
    tuning_rows,
)

CHANNELS, NAMES = 20, 30
ROWS = tuning_rows() | search_rows()
UNLIKE = ("untied", "without_init")  # don't start as the dense model


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(int(fresh_rng().integers(10**6)))
    return Memory(CHANNELS, torch.randn(NAMES, 24), dense(BASE))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(int(fresh_rng().integers(10**6)))
    y = torch.arange(300) % NAMES
    centers = 3 * torch.randn(NAMES, CHANNELS, generator=generator)
    return Glyphs(centers[y] + 0.1 * torch.randn(300, CHANNELS, generator=generator), y)


@pytest.mark.parametrize("name", ROWS)
def test_a_mixture_starts_as_the_dense_model_and_ffns_alone_train(base, data, name):
    row = ROWS[name]
    before = base.eval()(data.x)[0]
    start = tuned(base, row, CHANNELS, data, steps=0, seed=1).eval()(data.x)[0]
    if name in UNLIKE:
        assert not torch.allclose(start, before, atol=1e-3)
    else:
        torch.testing.assert_close(start, before, atol=1e-4, rtol=1e-4)
    model = tuned(base, row, CHANNELS, data, steps=3, seed=1)
    assert isinstance(model.ffn[0], MoEFeedForward) == (name not in ("control", "wide"))
    changed = {n for n, p in model.state_dict().items() if not n.startswith("ffn.")}
    for n in changed:
        assert torch.equal(model.state_dict()[n], base.state_dict()[n])
    assert not torch.allclose(model.eval()(data.x)[0], start, atol=1e-4)
    again = tuned(base, row, CHANNELS, data, steps=3, seed=1)
    assert torch.equal(again.eval()(data.x)[0], model.eval()(data.x)[0])


def test_training_learns_and_scores_are_those_of_the_groups(base, data):
    model = copy.deepcopy(base)
    train(model, data, 300, 5e-3, seed=0)
    frequency = ["r"] * 10 + ["c"] * 10 + ["f"] * 10
    found = score(model, data, frequency)
    scores = found["scores"]
    assert scores["all"] > 90 and found["routing"] == []
    groups = [scores[name] for name in ("rare", "common", "frequent")]
    assert scores["all"] == pytest.approx(np.mean(groups), abs=1e-3)
    wrong = Glyphs(data.x, torch.where(data.y < 10, (data.y + 1) % 10, data.y))
    found = score(model, wrong, frequency)["scores"]
    assert found["rare"] < 20 and found["frequent"] == scores["frequent"]


def test_widths_have_that_many_units():
    for width in name_memory.WIDTHS:
        model = Memory(CHANNELS, torch.randn(NAMES, 24), dense(width))
        assert [m.linear1.out_features for m in model.ffn] == [width] * (3 if width else 0)
        assert model(torch.randn(5, CHANNELS))[0].shape == (5, NAMES)


def test_rows_of_clusters_send_the_tokens_of_a_cluster_to_one_copy(base):
    centres = 5 * torch.randn(8, CHANNELS)
    y = torch.arange(400) % 8
    data = Glyphs(centres[y] + 0.01 * torch.randn(400, CHANNELS), y)
    row = search_rows()["clusters"]
    model = Memory(CHANNELS, base.names, row.ffn)
    model.load_state_dict(copy.deepcopy(base.state_dict()))
    start_from_clusters(model, base, data, seed=0)
    weight = model.ffn[0].router.weight
    assert torch.equal(weight[::2], weight[1::2])
    ids = model.eval()(data.x)[1][0].expert_ids
    assert all(len(ids[y == c].sort(1).values.unique(dim=0)) == 1 for c in range(8))


def test_what_trains_faster_or_is_left_out_is_what_the_row_says(base, data):
    """A router's first step of AdamW is its learning rate; a copy that is left out gets nothing."""
    rows = search_rows()
    start = tuned(base, rows["lr_10"], CHANNELS, data, steps=0, seed=1)
    moved = {
        name: (tuned(base, rows[name], CHANNELS, data, steps=1, seed=1).ffn[0].router.weight
               - start.ffn[0].router.weight).abs().median().item()
        for name in ("lr_10", "lr_0.1")
    }  # fmt: skip
    assert moved["lr_10"] == pytest.approx(100 * moved["lr_0.1"], rel=0.05)
    model = tuned(base, rows["drop"], CHANNELS, data, steps=1, seed=1)
    far = (model.ffn[0].experts.w2 - start.ffn[0].experts.w2).abs().flatten(1).amax(1)
    still = far < 1e-5  # weight decay alone
    assert still[::2].equal(still[1::2]) and still.any() and not still.all()
    assert all(ffn.router.dropped == () for ffn in model.ffn)
