"""Several data sets as one: sums, and which sets a pool has."""

import numpy as np
import pytest
from dynamic_dino.analysis.collect import Collection, LayerCounts
from dynamic_dino.analysis.pooled import members, pooled
from dynamic_dino.analysis.top_any_figures import shared_experts
from dynamic_dino.data import ODINW13
from dynamic_dino.evaluation.predictions import DatasetPredictions
from dynamic_dino.moe.top_any import TopAnyRouter


def collection(rng, name, scene):
    layers = []
    for i in range(2):
        pairs = rng.integers(0, 9, (4, 4))
        routes = rng.integers(0, 9, (3, 4)) if scene else None
        tokens = int(rng.integers(1, 99))
        entropy = rng.random() if scene else None
        load = rng.integers(1, 9, 4)
        layers.append(
            LayerCounts(f"decoder {i}", load, pairs, routes, "abc" * scene, tokens, entropy)
        )
    nothing = DatasetPredictions.cat([])
    files = {i: "a.png" for i in range(3)}
    return Collection(name, layers, [], nothing, np.zeros((0, 0, 0)), files, {})


@pytest.mark.parametrize("scene", [False, True])
def test_tokens_of_all_sets_count_alike(rng, scene):
    sets = [collection(rng, name, scene) for name in "xyz"]
    whole = pooled("three", sets)
    assert whole.dataset == "three" and len(whole.files) == 9 and len(whole.predictions) == 0
    for i, layer in enumerate(whole.layers):
        parts = [s.layers[i] for s in sets]
        assert layer.name == f"decoder {i}" and layer.tokens == sum(p.tokens for p in parts)
        for field in ("load", "pairs", *["routes"] * scene):
            total = sum(getattr(p, field) for p in parts)
            np.testing.assert_array_equal(getattr(layer, field), total)
        if scene:
            weights = [p.tokens for p in parts]
            mean = np.average([p.entropy for p in parts], weights=weights)
            assert layer.entropy == pytest.approx(mean) and layer.named == "abc"
        else:
            assert layer.entropy is layer.routes is None


def test_members_of_a_pool():
    title, sets = members("odinw13")
    assert title == "odinw13" and len(sets) == len(ODINW13) == 13
    assert all(name.startswith("odinw_") and "_val" in name for name in sets)
    assert members("mine= a, b") == ("mine", ["a", "b"])
    for wrong in ("odinw", "=a,b", "a=b", "a=b,b"):
        with pytest.raises(ValueError, match="write odinw13"):
            members(wrong)


def test_a_shared_expert_is_the_one_of_the_lowest_threshold(rng):
    router = TopAnyRouter(8, 5, initial_experts=4)
    router.thresholds.data = router.thresholds.data.new_tensor([0.1, -0.5, 0.2, 0.3, -9])
    layer = LayerCounts("decoder 0", np.array([40, 90, 30, 20, 0]), tokens=100)
    nothing = DatasetPredictions.cat([])
    found = Collection("x", [layer], [], nothing, np.zeros((0, 0, 0)), {}, {})
    [row] = shared_experts({"decoder 0": router}, found, "").rows
    name, expert, threshold, below, share, others, rank = row
    assert (name, expert) == ("decoder 0", 1) and threshold == pytest.approx(-0.5)
    assert below == pytest.approx(0.7 / np.std([0.1, 0.2, 0.3])) and rank == pytest.approx(-1)
    assert share == pytest.approx(0.9) and others == pytest.approx(0.3)
