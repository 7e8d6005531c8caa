"""What one pass collects is what the model returned, and the model does nothing more for it."""

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch
from dynamic_dino.analysis.collect import Collector, LayerCounts, collect, sorted_ids
from dynamic_dino.analysis.images import loader_of
from dynamic_dino.analysis.layers import moe_layers
from dynamic_dino.analysis.study import Options, study
from dynamic_dino.moe.routing import Routing
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts operators, and the elements that they make."""

    def __init__(self):
        super().__init__()
        self.calls, self.elements = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        self.elements[name] += result.numel() if isinstance(result, torch.Tensor) else 0
        return result


@pytest.fixture(scope="module")
def batches(x4):
    return list(loader_of(x4[1], "drawn_val", "all", batch_size=4)())


def test_outputs_are_the_same_bits(x4, batches, monkeypatch):
    model, _ = x4
    forward, kept = model.forward, []

    def recorded(inputs):
        outputs = forward(inputs)
        kept.append((outputs, copy.deepcopy(outputs)))
        return outputs

    with torch.no_grad():
        expected = [forward(batch) for batch in batches]
    monkeypatch.setattr(model, "forward", recorded)
    collect(model, batches, "drawn_val", "")
    for (outputs, before), clean in zip(kept, expected, strict=True):
        for output, copied, other in zip(outputs, before, clean, strict=True):
            assert output.keys() == copied.keys() == other.keys()
            for found in (copied["instances"], other["instances"]):
                for name in ("scores", "pred_classes", "queries"):
                    assert torch.equal(output["instances"].get(name), found.get(name))
                boxes = output["instances"].pred_boxes.tensor
                assert torch.equal(boxes, found.pred_boxes.tensor)
        for one, two in zip(outputs[0]["routings"], clean[0]["routings"], strict=True):
            assert torch.equal(one.expert_ids, two.expert_ids)
            assert one.gates is two.gates is None and torch.equal(one.probs, two.probs)


def test_the_model_runs_once_and_collecting_adds_little(x4, batches, monkeypatch):
    """Times vary; what is done doesn't: no layer runs again, and what collecting makes is small.

    The pictures are tiny, so this is the worst case.
    """
    model, _ = x4
    forward, calls = model.forward, []
    monkeypatch.setattr(model, "forward", lambda batch: calls.append(batch) or forward(batch))
    with torch.no_grad(), Operations() as alone:
        for batch in batches:
            model(batch)
    with Operations() as collecting:
        collect(model, batches, "drawn_val", "")
    assert len(calls) == 2 * len(batches)
    for name in ("convolution", "mm", "addmm", "bmm"):
        assert collecting.calls[name] == alone.calls[name], name
    assert alone.calls["addmm"] and alone.calls["convolution"]
    assert collecting.elements.total() < 1.01 * alone.elements.total()


def test_collection_against_loops(x4, batches):
    model, _ = x4
    collection = collect(model, batches, "drawn_val", "")
    assert [layer.name for layer in collection.layers] == ["decoder 0", "decoder 1", "decoder 2"]
    with torch.no_grad():
        outputs = [model(batch) for batch in batches]
    for n, layer in enumerate(collection.layers):
        load, pairs, entropies = [0] * 4, [[0] * 4 for _ in range(4)], []
        for output in outputs:
            routing = output[0]["routings"][n]
            for ids, p in zip(routing.expert_ids.tolist(), routing.probs, strict=True):
                for a in ids:
                    load[a] += 1
                    for b in ids:
                        pairs[a][b] += a != b
                entropies.append(-(p * p.log()).sum().item() / np.log(4))
        assert layer.load.tolist() == load and layer.pairs.tolist() == pairs
        assert layer.tokens == len(entropies) == 300
        assert layer.entropy == pytest.approx(np.mean(entropies), abs=1e-4)
        assert layer.routes is None
    row = 0
    for batch, output in zip(batches, outputs, strict=True):
        for sample, found in zip(batch, output, strict=True):
            assert collection.files[sample["image_id"]] == sample["file_name"]
            for k in range(len(found["instances"])):
                query = int(found["instances"].queries[k])
                for n in range(3):
                    ids = sorted(output[0]["routings"][n].expert_ids[query].tolist())
                    assert collection.experts[row, n].tolist() == ids
                assert collection.predictions.image_ids[row] == sample["image_id"]
                row += 1
    assert row == len(collection.predictions)


def test_empty_slots_and_scene_routes(rng):
    ids = torch.tensor([[3, 0, -1], [1, -1, -1], [-1, -1, -1], [0, 3, 2]], dtype=torch.int32)
    routing = Routing(ids, (ids >= 0).float(), torch.full((4, 5), 0.2))
    routing.scene_probs = torch.rand(4, 3)
    routing.scene_routes = torch.tensor([[2, 0], [2, 0], [0, 1], [0, 1]], dtype=torch.int32)
    layer = LayerCounts("decoder 0")
    layer.add(routing, ids.numpy())
    layer.add(routing, ids.numpy())
    assert layer.load.tolist() == [4, 2, 2, 4, 0] and layer.tokens == 8
    assert layer.pairs[0].tolist() == [0, 0, 2, 4, 0] and layer.pairs[1].sum() == 0
    assert layer.routes.tolist() == [[2, 0, 2, 2, 0], [0] * 5, [2, 2, 0, 2, 0]]
    assert layer.entropy == pytest.approx(1)
    routing.active = torch.ones(5, dtype=torch.bool)  # a top-any router: no distribution
    layer = LayerCounts("decoder 0")
    layer.add(routing, ids.numpy())
    assert layer.entropy is None
    assert sorted_ids(ids.numpy()).tolist() == [[0, 3, -1], [1, -1, -1], [-1] * 3, [0, 2, 3]]


def test_layers_that_report_nothing(x4, batches):
    model, _ = x4
    assert list(moe_layers(model)) == ["decoder 0", "decoder 1", "decoder 2"]
    collector = Collector(model, "drawn_val")
    with pytest.raises(ValueError, match="3 MoE layers, but returned 0 routings"):
        collector.add(batches[0], [{"instances": None}])


def test_images_are_spread_and_no_more_than_asked_for(x4):
    ids = [s["image_id"] for b in loader_of(x4[1], "drawn_val", "all", 3)() for s in b]
    assert ids == [1, 5, 10]
    assert len(list(loader_of(x4[1], "drawn_val", "all", 99, batch_size=1)())) == 10
    [[sample]] = list(loader_of(x4[1], "drawn_val", 5, 1)())
    assert len(sample["prompt_classes"]) == 5


def test_of_captions_only_the_routings_are_kept(x4, drawn):
    """A caption for each drawn picture, in ODVG format."""
    model, cfg = x4
    images = json.loads((drawn / "drawn/annotations/val.json").read_text())["images"]
    region = {"bbox": [2, 2, 30, 30], "phrase": "a red circle"}
    lines = [
        {
            "filename": image["file_name"],
            "height": image["height"],
            "width": image["width"],
            "grounding": {"caption": "a red circle on a wall", "regions": [region]},
        }
        for image in images
    ]
    file = drawn / "drawn/val/captions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    collection = collect(model, loader_of(cfg, str(file), "all", 3)(), str(file), "")
    assert len(collection.files) == 3 and collection.layers[0].tokens == 90
    assert len(collection.predictions) == 0 and collection.names == {}
    numbers = study(model, cfg, str(file), Options(max_images=3), "")[2]
    assert "AP" not in numbers and "decoder 2: effective partners" in numbers
    with pytest.raises(ValueError, match="no AP to lose"):
        study(model, cfg, str(file), Options(max_images=3, drop="last"), "")
