"""Whether routes tell scenes apart: known information, chance, and what the script measures."""

import json

import numpy as np
import pytest
import scenes
import torch
from detectron2.config import instantiate
from dynamic_dino.analysis.images import loader_of
from dynamic_dino.config import load_config
from dynamic_dino.data.datasets import register_builtin
from dynamic_dino.data.synthetic.drawn import NAMES, write_drawn_dataset
from dynamic_dino.engine.setup import setup
from dynamic_dino.engine.train import do_train
from dynamic_dino.files import configs_folder
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.serving.inference import load_model
from helpers.seeds import fresh_rng
from lib import tables
from lib.scene_statistics import (
    common_share,
    folds,
    information_by_chance,
    normalised_information,
    one_hot,
    table,
    told_apart,
    told_by_features,
)


def test_information_of_known_tables(rng):
    order = rng.permutation(5)
    sets = np.diag(rng.integers(1, 9, 5))[order]
    assert normalised_information(sets) == pytest.approx(1), "each tells the other"
    rows, columns = rng.random(4) + 0.1, rng.random(6) + 0.1
    assert normalised_information(np.outer(rows, columns)) == pytest.approx(0, abs=1e-12)
    assert normalised_information(np.array([[5, 0], [3, 0]])) == 0, "one route for all"
    # two sets of four images, two routes, one image of each set astray: 1 - H(1 / 4)
    bits = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert normalised_information(np.array([[3, 1], [1, 3]])) == pytest.approx(1 - bits)
    # finer routes than sets: I = H(sets), and the mean of both entropies is below it
    finer = np.array([[2, 2, 0, 0], [0, 0, 2, 2]])
    assert normalised_information(finer) == pytest.approx(2 * 1 / (1 + 2))


def test_information_of_a_random_table_by_its_definition(rng):
    counts = rng.integers(0, 9, (5, 7)).astype(float)
    counts[rng.integers(5), rng.integers(7)] = 0
    total, information, rows, columns = counts.sum(), 0.0, 0.0, 0.0
    for i in range(5):
        p = counts[i].sum() / total
        rows -= p * np.log(p)
        for j in range(7):
            q, both = counts[:, j].sum() / total, counts[i, j] / total
            information += both * np.log(both / (p * q)) if both else 0
    for j in range(7):
        q = counts[:, j].sum() / total
        columns -= q * np.log(q)
    expected = information / ((rows + columns) / 2)
    assert normalised_information(counts) == pytest.approx(expected, rel=1e-12)
    assert normalised_information(counts.T) == pytest.approx(expected, rel=1e-12)


def test_chance_is_what_routes_without_meaning_have(rng):
    kinds = np.repeat(np.arange(4), 30)
    routes = one_hot(rng.integers(0, 5, 120))
    chance = information_by_chance(routes, kinds, 100, rng)
    assert chance.min() > 0 and chance.mean() < 0.1
    found = normalised_information(table(routes, kinds))
    assert found < 3 * chance.max()
    learnt = normalised_information(table(one_hot(kinds), kinds))
    assert learnt == pytest.approx(1) and learnt > 5 * chance.max()
    # Queries of an image that go together are no independent witnesses: chance stays what it is.
    many = information_by_chance(100 * routes, kinds, 100, np.random.default_rng(0))
    few = information_by_chance(routes, kinds, 100, np.random.default_rng(0))
    np.testing.assert_allclose(many, few)


def test_sets_told_from_patterns(rng):
    kinds = rng.permutation(np.repeat(np.arange(5), 20))
    told = kinds[:, None, None] * [[1, 2], [3, 4]]
    assert told_apart(told, kinds, rng) == 1
    assert told_apart(np.zeros((100, 3), int), kinds, rng) == pytest.approx(1 / 5)
    alone = np.arange(100)[:, None]  # a pattern of its own for every image tells nothing
    assert told_apart(alone, kinds, rng) == pytest.approx(1 / 5)
    pairs = (kinds // 2)[:, None]  # sets 0 and 1 look alike, 2 and 3 do, 4 doesn't
    assert told_apart(pairs, kinds, rng) == pytest.approx(3 / 5)
    by_chance = [told_apart(rng.integers(0, 4, (100, 1)), kinds, rng) for _ in range(60)]
    assert np.mean(by_chance) == pytest.approx(1 / 5, abs=0.04)
    spread = np.array([np.bincount(kinds[folds(kinds, rng) == f]) for f in range(5)])
    assert (spread == 4).all()


def test_sets_told_from_features(rng):
    kinds = np.repeat(np.arange(3), 40)
    centres = rng.normal(size=(3, 8))
    assert told_by_features(5 * centres[kinds] + 0.1 * rng.normal(size=(120, 8)), kinds, rng) == 1
    noise = [told_by_features(rng.normal(size=(120, 8)), kinds, rng) for _ in range(20)]
    assert np.mean(noise) == pytest.approx(1 / 3, abs=0.08)


def test_what_features_have_in_common(rng):
    noise = rng.normal(size=(400, 8))
    noise -= noise.mean(0)
    assert common_share(noise) == pytest.approx(0, abs=1e-12)
    assert common_share(np.tile(rng.normal(size=8), (5, 1))) == pytest.approx(1)
    shift = 3 * rng.normal(size=8)
    own = (noise**2).sum(1).mean()
    assert common_share(noise + shift) == pytest.approx(shift @ shift / (shift @ shift + own))


# ---- the detector -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """drawn_val and drawn_train: 6 and 4 pictures of 64 pixels."""
    root = tmp_path_factory.mktemp("datasets")
    write_drawn_dataset(root, 6, 64, seed=3, split="val")
    write_drawn_dataset(root, 4, 64, seed=4, split="train")
    register_builtin(root)
    yield root
    register_builtin()


SIZES = ["model.canvas=64", "inference.size=64", "model.query_selection.num_queries=12"]


def tiny(*overrides: str):
    cfg = load_config(configs_folder() / "himoe/nano_x16_drawn.py", [*SIZES, *overrides])
    model = instantiate(cfg.model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval(), cfg


@pytest.fixture(scope="module")
def himoe(root):
    return tiny()


def test_what_is_measured_is_what_the_detector_does(himoe):
    model, cfg = himoe
    routers = scenes.scene_routers(model)
    assert list(routers) == [f"decoder {i}" for i in range(len(model.decoder.layers))]
    own = [router.scene_weight.data.clone() for router in routers.values()]
    generator = torch.Generator().manual_seed(int(fresh_rng().integers(10**6)))
    drawn = scenes.drawn_anew(routers.values(), generator)
    batches = list(loader_of(cfg, "drawn_val", "all", None, 4)())
    features, found = scenes.route(model, batches, Prompt.from_phrases(NAMES), [own, drawn])
    assert features.shape == (6, own[0].shape[1]) and len(found) == 2

    for weights, got in zip((own, drawn), found, strict=True):
        for layer, (router, weight) in enumerate(zip(routers.values(), weights, strict=True)):
            logits = features @ weight.numpy().T
            best = (-logits).argsort(1)[:, : router.active_routes]
            np.testing.assert_array_equal(got.routes[:, layer], best)
            pools = router.pools.numpy()[best].any(1)  # [N, E]
            assert (got.experts[:, layer][~pools] == 0).all(), "experts of the pool alone"
            assert (got.experts[:, layer].sum(1) == 12 * router.top_k).all()
    assert not np.array_equal(found[0].routes, found[1].routes)
    for router, weight in zip(routers.values(), own, strict=True):
        torch.testing.assert_close(router.scene_weight.data, weight, rtol=0, atol=0)

    start = 0  # the detector's own way, from images to routings
    with torch.no_grad():
        for batch in batches:
            for layer, routing in enumerate(model(batch)[0]["routings"]):
                for i, image in enumerate(routing.expert_ids.view(len(batch), -1).long()):
                    counts = torch.bincount(image, minlength=16).numpy()
                    np.testing.assert_array_equal(found[0].experts[start + i, layer], counts)
            start += len(batch)


def test_routers_that_know_the_sets_and_such_that_do_not(rng):
    """`measure` on made-up routings: the first layer knows the sets, the second nothing."""
    kinds = np.repeat(np.arange(3), 20)
    routes = np.array([[[kind, kind + 1], [0, 1]] for kind in kinds])
    experts = np.zeros((60, 2, 8))
    experts[np.arange(60), 0, 2 * kinds] = 24
    experts[:, 1] = 3
    found = scenes.measure(scenes.Routes(routes, experts), ["a", "b"], 4, kinds, 30, rng)
    first, second = found["layers"]
    assert first["routes"]["shares"] == np.eye(4)[:3].tolist()
    for what in ("routes", "experts"):
        assert first[what]["information"] == pytest.approx(1)
        assert first[what]["by_chance"] < first[what]["by_chance_97.5"] < 0.3
        assert second[what]["information"] == pytest.approx(0, abs=1e-12)
    assert found["told_apart"] == first["told_apart"] == 1
    assert second["told_apart"] == pytest.approx(1 / 3)
    assert found["told_apart_by_chance"] < 0.5


def test_random_routers_tell_features_apart_as_far_as_these_are(rng):
    kinds = np.repeat(np.arange(3), 20)
    apart = np.eye(3)[kinds] @ rng.normal(size=(3, 16))
    random = scenes.random_routers(apart, 3, 4, 2, kinds, 40, rng)
    assert len(random["information"]) == len(random["told_apart"]) == 40
    assert np.mean(random["told_apart"]) > 0.8, "projections of features that differ differ"
    noise = scenes.random_routers(rng.normal(size=(60, 16)), 3, 4, 2, kinds, 40, rng)
    assert np.mean(noise["told_apart"]) < 0.5
    assert np.mean(noise["information"]) < 0.2 < np.mean(random["information"])
    assert scenes.place_among(2, [1, 2, 3, 4]) == pytest.approx(1.5 / 4)


def test_the_script(himoe, monkeypatch, tmp_path, capsys):
    model, cfg = himoe
    monkeypatch.setattr(scenes, "load_model", lambda *_, **__: himoe)
    start = [torch.zeros_like(r.scene_weight) for r in scenes.scene_routers(model).values()]
    monkeypatch.setattr(scenes, "weights_at_the_start", lambda *_: start)
    file, picture = tmp_path / "found.json", tmp_path / "new/found.png"
    small = ["--draws", "1", "--random", "5", "--permutations", "3", "--device", "cpu"]
    out = ["--json", str(file), "--plot", str(picture)]
    sets = ["--sets", "drawn_val", "drawn_train"]
    assert scenes.main(["recipe", "one", "two", *sets, *small, *out]) == 0
    report = json.loads(file.read_text())
    assert report["images"] == 4 and set(report["runs"]) == {"one", "two"}
    run = report["runs"]["two"]
    assert len(run["trained"]["layers"]) == len(model.decoder.layers)
    for row in run["start"]["layers"]:  # all routes are equally probable: the first is taken
        assert row["routes"]["shares"] == [[1, 0, 0, 0]] * 2
        assert row["routes"]["information"] == 0
    for row in run["trained"]["layers"]:
        np.testing.assert_allclose(np.sum(row["routes"]["shares"], 1), 1, atol=1e-3)
        np.testing.assert_allclose(np.sum(row["experts"]["shares"], 1), 1, atol=2e-3)
    assert picture.stat().st_size > 10_000
    assert "told apart by all routes" in capsys.readouterr().out
    assert "| decoder 0 |" in tables.scenes(report)


@pytest.mark.slow
def test_the_start_of_a_run_is_drawn_as_its_training_drew_it(himoe, tmp_path):
    """A run that learns nothing, at a rate of 0, has the weights it started from."""
    recipe = configs_folder() / "himoe/nano_x16_drawn.py"
    dense = instantiate(load_config(configs_folder() / "pretrain/nano_drawn.py").model)
    torch.save({"model": dense.state_dict()}, tmp_path / "dense.pth")
    overrides = (
        f"train.seed={fresh_rng().integers(10**6)}",
        f"train.init_checkpoint={tmp_path / 'dense.pth'}",
        f"train.output_dir={tmp_path / 'run'}",
        "train.device=cpu",
        "train.max_iter=1",
        "optimizer.lr=0",
        "dataloader.train.dataset.names=drawn_train",
        "dataloader.train.total_batch_size=1",
        "dataloader.train.num_workers=0",
        "dataloader.test={}",
        "dataloader.evaluator={}",
    )
    cfg = load_config(recipe, overrides)
    setup(cfg)
    trained = scenes.scene_routers(do_train(cfg)).values()
    _, run = load_model(tmp_path / "run")
    start = scenes.weights_at_the_start(recipe, run)
    assert len(start) == len(trained)
    for weight, router in zip(start, trained, strict=True):
        torch.testing.assert_close(weight, router.scene_weight.data, rtol=0, atol=0)
    other = scenes.weights_at_the_start(
        recipe, load_config(recipe, [*overrides, "train.seed=1000001"])
    )
    assert not torch.equal(other[0], start[0])


def test_a_detector_without_scene_routers_is_refused(root, monkeypatch, capsys):
    model = tiny("model.decoder.layer.ffn.router.variant=instance")
    monkeypatch.setattr(scenes, "load_model", lambda *_, **__: model)
    sets = ["--sets", "drawn_val", "drawn_train", "--device", "cpu"]
    assert scenes.main(["recipe", "run", *sets]) == 2
    assert "name a run of a recipe of HI-MoE" in capsys.readouterr().err
    assert scenes.main(["recipe", "run", "--sets", "drawn_val", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    for wrong, told in ((["--sets", "drawn_val"], "two or more"), (["--images", "0"], "1 or more")):
        with pytest.raises(SystemExit):
            scenes.main(["recipe", "run", *sets, *wrong])
        assert told in capsys.readouterr().err
