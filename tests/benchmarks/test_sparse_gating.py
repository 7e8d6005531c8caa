"""Equation 8 of DynMoE alone: what it leaves free, and what a term for few experts does."""

import pytest
import sparse_gating
import torch
from dynamic_dino.moe.top_any import TopAnyRouter
from helpers.seeds import fresh_rng
from lib import tables


def test_thresholds_move_the_experts_and_not_the_loss(tmp_path):
    torch.manual_seed(int(fresh_rng().integers(10**6)))
    tokens = torch.randn(1, 200, 64)
    rows = sparse_gating.by_threshold(TopAnyRouter(64, 6), tokens, [-1.0, 0.0, 1.0])
    assert [row["experts"] for row in rows] == [6, pytest.approx(3, abs=0.5), 0]
    assert len({row["loss"] for row in rows}) == 1
    descent = {start: sparse_gating.descend(start, tokens, 6, 40) for start in sparse_gating.STARTS}
    plain, normal, few = descent.values()
    assert plain[0]["loss"] == pytest.approx(1) and plain[-1]["loss"] < 1.2  # at its minimum
    assert normal[-1]["loss"] < normal[0]["loss"]
    for found in (plain, normal):
        assert found[-1]["experts"] == pytest.approx(3, abs=0.7)
    assert few[-1]["experts"] < 2
    report = {"settings": {"experts": 6}, "thresholds": rows, "descent": descent}
    assert "a token takes 6.0 to 0.0 experts" in tables.sparse_gating(report)
    sparse_gating.plot(report, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new/plot.png").stat().st_size > 10_000
