"""The scene: statistics of proposals, against plain loops, and one scene router for all layers."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from dynamic_dino.config import load_config
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.modeling.proposals import STATISTICS, ProposalStatistics
from dynamic_dino.modeling.structures import Predictions
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.scene_router import SceneRouter

CONFIGS = Path(__file__).parents[2] / "configs"


def proposals(images=3, count=11, classes=5):
    logits = 2 * torch.randn(images, count, classes) - 2
    logits[:, :, 1] = -torch.inf  # a class that nobody asked for
    sizes = torch.rand(images, count, 2).square() * 0.9 + 0.01
    boxes = torch.cat([torch.rand(images, count, 2), sizes], -1)
    return Predictions(logits.requires_grad_(), boxes.requires_grad_())


def by_hand(logits, boxes) -> list[float]:
    """Of one image; lists of numbers."""
    scores = [max(1 / (1 + math.exp(-x)) for x in row) for row in logits]
    total, count = sum(scores), len(scores)
    shares = [0.0] * 4
    for score, (_, _, width, height) in zip(scores, boxes, strict=True):
        side = math.sqrt(width * height)
        shares[(side >= 0.05) + (side >= 0.15) + (side >= 0.4)] += score / total
    spread = []
    for axis in (0, 1):
        mean = sum(s * box[axis] for s, box in zip(scores, boxes, strict=True)) / total
        squares = [s * (box[axis] - mean) ** 2 for s, box in zip(scores, boxes, strict=True)]
        spread.append(math.sqrt(sum(squares) / total))
    above = [sum(s > t for s in scores) / count for t in (0.1, 0.3, 0.5)]
    number = math.log(1 + total) / math.log(1 + count)
    return [total / count, max(scores), *above, number, *shares, *spread]


def test_by_hand():
    found, scene = proposals(), torch.randn(3, 6)
    result = ProposalStatistics()(scene, found)
    assert result.shape == (3, 6 + len(STATISTICS)) and torch.equal(result[:, :6], scene)
    for row, logits, boxes in zip(result[:, 6:], found.logits, found.boxes, strict=True):
        assert row.tolist() == pytest.approx(by_hand(logits.tolist(), boxes.tolist()), abs=1e-5)
    assert (result[:, 6:] >= 0).all() and (result[:, 6:] <= 1).all()


def test_at_the_ends():
    nothing = Predictions(torch.full((1, 4, 2), -100.0), torch.full((1, 4, 4), 0.5))
    certain = Predictions(torch.full((1, 4, 2), 100.0), torch.full((1, 4, 4), 0.5))
    one = dict(zip(STATISTICS, ProposalStatistics()(torch.zeros(1, 0), certain)[0], strict=True))
    assert one["mean score"] == one["number of objects"] == one["share of sides from 0.4"] == 1
    assert one["spread in x"] == 0
    assert (ProposalStatistics()(torch.zeros(1, 0), nothing) == 0).all()


def test_gradients_reach_the_scene_and_its_router_alone():
    found, scene = proposals(), torch.randn(3, 6, requires_grad=True)
    router = HierarchicalRouter(6, 8, std=1.0, scene_dim=6 + len(STATISTICS))
    tokens = torch.randn(3, 7, 6)
    seen = ProposalStatistics()(scene, found)
    routing = router(tokens, seen)
    (routing.gates * torch.randn_like(routing.gates)).sum().backward()
    assert scene.grad.abs().max() > 0
    trained = router.scene_weight.grad.abs().amax(0) > 0
    assert torch.equal(trained, (seen != 0).any(0)), "by every statistic that says anything"
    assert found.logits.grad is None and found.boxes.grad is None


def test_the_router_must_know_of_them():
    router = HierarchicalRouter(6, 8)
    with pytest.raises(ValueError, match="scene has 18 features, the router's scene_dim is 6"):
        router(torch.randn(3, 7, 6), ProposalStatistics()(torch.randn(3, 6), proposals()))


def drawn_detector(*options: str, **nodes):
    """HI-MoE on closed-set DINO, two layers, and what it decodes of one image."""
    cfg = load_config(
        CONFIGS / "himoe/dino_nano_drawn.py", ["model.decoder.num_layers=2", *options]
    )
    for name, node in nodes.items():
        cfg.model[name] = node
    model = instantiate(cfg.model).eval()
    image = torch.randint(256, (3, 128, 128), dtype=torch.uint8)
    sample = {"image": image, "image_size": (100, 128), "height": 100, "width": 128}
    text = model.text_encoder([Prompt.from_phrases(model.text_encoder.names)])
    with torch.no_grad():
        features, masks = model.image_features([sample])
        output = model.decode(features, masks, text)
        memory, _, _ = model.enhancer(features, masks, text)
    return model, output, memory


ROUTER = "model.decoder.layer.ffn.router"


def test_in_a_detector():
    """The scene of the decoder's routers is that of the encoder and the statistics."""
    model, output, memory = drawn_detector(
        f"{ROUTER}.scene_dim={256 + len(STATISTICS)}",
        proposal_statistics={"_target_": ProposalStatistics},
    )
    scene = ProposalStatistics()(memory.scene, output.selection)
    for layer, routing in zip(model.decoder.layers, output.routings, strict=True):
        wanted = (scene @ layer.ffn.router.scene_weight.T).softmax(-1)
        torch.testing.assert_close(routing.scene_probs, wanted.expand_as(routing.scene_probs))


def test_one_scene_router_sees_all_levels_and_decides_for_all_layers():
    router = {"_target_": SceneRouter, "dim": 256, "num_routes": 4, "std": 1.0}
    model, output, memory = drawn_detector(
        "model.scene_levels=all", f"{ROUTER}.shared_scene=true", scene_router=router
    )
    scene = memory.tokens[0][memory.mask[0]].mean(0)
    g = (scene.double() @ model.scene_router.weight.double().T).softmax(-1).float()
    assert not any("scene_weight" in name for name in model.state_dict())
    first, second = output.routings
    for routing in (first, second):
        torch.testing.assert_close(
            routing.scene_probs, g.expand_as(routing.scene_probs), atol=1e-4, rtol=1e-4
        )
        assert torch.equal(routing.scene_routes, first.scene_routes)
    assert (memory.scene - scene).abs().max() > 1e-3, "the coarsest level is another scene"
    model.scene_router = None
    with pytest.raises(ValueError, match="not the probabilities of 4 routes, as shared_scene"):
        model.decoder.layers[0].ffn.router(torch.randn(1, 3, 256), model.scene(memory, None))
    with pytest.raises(ValueError, match="scene_levels needs coarsest or all, not 'finest'"):
        drawn_detector("model.scene_levels=finest")
    with pytest.raises(ValueError, match="2 route_names for num_routes=4 routes"):
        HierarchicalRouter(6, 8, route_names=["in", "out"])
