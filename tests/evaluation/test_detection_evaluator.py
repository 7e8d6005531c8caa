"""`DetectionEvaluator`: from the detector's Instances to the files, alone and on two processes."""

import json
import logging
import uuid

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Boxes, Instances
from dynamic_dino.evaluation import DetectionEvaluator, coco_ap, lvis_ap
from dynamic_dino.moe.routing import Routing
from helpers.seeds import fresh_rng

CATEGORY_IDS = [11, 4, 30, 7]  # contiguous class -> id of the JSON file
NAMES = ["red panda", "windmill", "mug", "acorn"]


def scene(rng, images=12):
    truth = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(images)],
        "categories": [{"id": c, "name": n} for c, n in zip(CATEGORY_IDS, NAMES, strict=True)],
        "annotations": [],
    }
    for i in range(images):
        for _ in range(rng.integers(1, 6)):
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]),
                    "image_id": i,
                    "category_id": int(rng.choice(CATEGORY_IDS)),
                    "bbox": rng.uniform(10, 200, 4).round(2).tolist(),
                }
            )
    return truth


def register(truth, folder, **metadata):
    name = f"evaluator_test_{uuid.uuid4().hex}"
    (folder / "truth.json").write_text(json.dumps(truth))
    MetadataCatalog.get(name).set(
        json_file=str(folder / "truth.json"),
        thing_classes=NAMES,
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(CATEGORY_IDS)},
        **metadata,
    )
    return name


def detect(rng, truth):
    """Batches of one sample each, with a prompt in an order of its own, and noisy detections."""
    batches = []
    for image in truth["images"]:
        prompt = [int(c) for c in rng.permutation(len(NAMES))]
        boxes, classes = [], []
        for a in truth["annotations"]:
            if a["image_id"] == image["id"]:
                x, y, w, h = np.array(a["bbox"]) * (1 + rng.normal(0, 0.08, 4))
                boxes.append([x, y, x + w, y + h])
                classes.append(prompt.index(CATEGORY_IDS.index(a["category_id"])))
        output = Instances((500, 500))
        output.pred_boxes = Boxes(torch.tensor(boxes))
        output.scores = torch.from_numpy(rng.random(len(boxes))).float()
        output.pred_classes = torch.tensor(classes)
        sample = {
            "image_id": image["id"],
            "file_name": image["file_name"],
            "prompt_classes": prompt,
        }
        batches.append(([sample], [{"instances": output}]))
    return batches


def as_predictions(batches):
    """The same detections, converted by hand."""
    predictions = []
    for [sample], [output] in batches:
        for k in range(len(output["instances"])):
            x0, y0, x1, y1 = output["instances"].pred_boxes.tensor[k].double().tolist()
            phrase = int(output["instances"].pred_classes[k])
            predictions.append(
                {
                    "image_id": sample["image_id"],
                    "category_id": CATEGORY_IDS[sample["prompt_classes"][phrase]],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": float(output["instances"].scores[k]),
                }
            )
    return predictions


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "dynamic_dino.evaluation")
    return caplog


def test_phrases_are_mapped_to_categories_and_everything_is_written(tmp_path, log):
    rng = fresh_rng()
    truth = scene(rng)
    batches = detect(rng, truth)
    name = register(truth, tmp_path, frequency=list("rcff"), novel=[True, False, False, False])
    evaluator = DetectionEvaluator(name, tmp_path / "out" / "val")
    evaluator.source = {"weights": "model_0000004.pth", "iteration": 4}
    evaluator.reset()
    for inputs, outputs in batches:
        evaluator.process(inputs, outputs)
    metrics = evaluator.evaluate()

    groups = {"r": [11], "c": [4], "f": [30, 7], "_seen": [4, 30, 7], "_novel": [11]}
    expected = coco_ap(truth, as_predictions(batches), groups=groups)
    assert 0 < metrics["AP"] < 100
    assert dict(metrics) == pytest.approx(expected.metrics)

    out = tmp_path / "out" / "val"
    assert sorted(p.name for p in out.iterdir()) == [
        "predictions.json",
        "results.json",
        "results.txt",
    ]
    saved = coco_ap(tmp_path / "truth.json", out / "predictions.json", groups=groups)
    assert saved.metrics == dict(metrics), "predictions.json doesn't reproduce the metrics"
    results = json.loads((out / "results.json").read_text())
    assert results["metrics"] == dict(metrics)
    assert results["weights"] == "model_0000004.pth" and results["iteration"] == 4
    assert "; model_0000004.pth, iteration 4\n" in (out / "results.txt").read_text()
    by_name = {row["name"]: row for row in results["per_class"]}
    assert (by_name["red panda"]["frequency"], by_name["red panda"]["novel"]) == ("r", True)
    for text in (log.text, (out / "results.txt").read_text()):
        assert "red panda (r, novel)" in text and f"{metrics['AP50_seen']:.1f}" in text


def test_reset_forgets(tmp_path):
    rng = fresh_rng()
    truth = scene(rng)
    batches = detect(rng, truth)
    evaluator = DetectionEvaluator(register(truth, tmp_path))
    results = []
    for _ in range(2):
        evaluator.reset()
        for inputs, outputs in batches:
            evaluator.process(inputs, outputs)
        results.append(evaluator.evaluate())
    assert results[0] == results[1]


def test_unasked_objects_count_as_missed_with_a_warning(tmp_path, log):
    rng = fresh_rng()
    truth = scene(rng)
    truth["annotations"][0]["category_id"] = CATEGORY_IDS[2]
    batches = detect(rng, truth)
    unasked = 0
    for [sample], [output] in batches:
        kept = [i for i, c in enumerate(sample["prompt_classes"]) if c != 2]
        remap = {old: new for new, old in enumerate(kept)}
        instances = output["instances"]
        instances = instances[[int(c) in kept for c in instances.pred_classes]]
        unasked += len(output["instances"]) - len(instances)
        instances.pred_classes = torch.tensor([remap[int(c)] for c in instances.pred_classes])
        output["instances"] = instances
        sample["prompt_classes"] = [sample["prompt_classes"][i] for i in kept]
    evaluator = DetectionEvaluator(register(truth, tmp_path))
    evaluator.reset()
    for inputs, outputs in batches:
        evaluator.process(inputs, outputs)
    metrics = evaluator.evaluate()
    assert metrics["AP"] == pytest.approx(coco_ap(truth, as_predictions(batches)).metrics["AP"])
    assert f"{unasked} objects of 1 classes are not named" in log.text


def test_unprocessed_images_are_left_out_with_a_warning(tmp_path, log):
    rng = fresh_rng()
    truth = scene(rng)
    batches = detect(rng, truth)[:5]
    evaluator = DetectionEvaluator(register(truth, tmp_path))
    evaluator.reset()
    for inputs, outputs in batches:
        evaluator.process(inputs, outputs)
    metrics = evaluator.evaluate()
    expected = coco_ap(truth, as_predictions(batches), image_ids=range(5)).metrics
    assert dict(metrics) == pytest.approx(expected)
    assert "5 of 12 images were processed" in log.text


class Replay(torch.nn.Module):
    """A detector that knows the answers."""

    def __init__(self, batches, routings=None):
        super().__init__()
        self.answers = {sample["image_id"]: output for [sample], [output] in batches}
        self.routings = routings
        self.modes = []

    def forward(self, samples):
        self.modes.append((self.training, torch.is_grad_enabled()))
        outputs = [dict(self.answers[s["image_id"]]) for s in samples]
        outputs[0]["routings"] = self.routings
        return outputs


def test_inference_loop(tmp_path):
    rng = fresh_rng()
    truth = scene(rng)
    batches = detect(rng, truth)
    loader = [batches[i][0] + batches[i + 1][0] for i in range(0, len(batches), 2)]
    model = Replay(batches).train()
    metrics = inference_on_dataset(model, loader, [DetectionEvaluator(register(truth, tmp_path))])
    assert dict(metrics) == pytest.approx(coco_ap(truth, as_predictions(batches)).metrics)
    assert model.modes == [(False, False)] * len(loader)
    assert model.training


def routing(ids, experts=4):
    ids = torch.tensor(ids, dtype=torch.int32)
    return Routing(ids, torch.ones(ids.shape), torch.full((len(ids), experts), 1 / experts))


def test_routing_is_reported_for_each_layer(tmp_path, log):
    rng = fresh_rng()
    truth = scene(rng)
    batches = detect(rng, truth)
    # Expert e is part e % 2 of copy e // 2: the first layer keeps siblings, the second never does.
    layers = [routing([[0, 1], [2, 3], [1, 0], [0, 1]]), routing([[0, 2], [3, 0], [2, 0], [0, 2]])]
    model = Replay(batches, layers)
    evaluator = DetectionEvaluator(register(truth, tmp_path), tmp_path / "out")
    metrics = inference_on_dataset(model, [inputs for inputs, _ in batches], evaluator)
    assert metrics["routing/layer0/siblings"] == 1 and metrics["routing/layer1/siblings"] == 0
    assert metrics["routing/layer0/same_part"] == 0 and metrics["routing/layer1/same_part"] == 0.75
    assert metrics["routing/layer1/dead_experts"] == 1
    saved = json.loads((tmp_path / "out" / "results.json").read_text())["routing"]
    assert saved[0]["load"] == pytest.approx([3 / 8, 3 / 8, 1 / 8, 1 / 8])
    assert "same part twice" in log.text and "75.0" in log.text
    assert "per token" in log.text and "2.00" in log.text

    dense = inference_on_dataset(Replay(batches), [inputs for inputs, _ in batches], evaluator)
    assert not [key for key in dense if "routing" in key], "reset() keeps routing statistics"


def run_rank(rank, world, folder, names, batches, max_dets):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    for protocol, name in names.items():
        evaluator = DetectionEvaluator(
            name, folder / f"two {protocol}", protocol=protocol, max_dets=max_dets[protocol]
        )
        evaluator.reset()
        for inputs, outputs in batches[rank::world]:
            # Rank 0 uses experts 0 and 1 only, rank 1 the experts 2 and 3.
            outputs[0]["routings"] = [routing([[2 * rank, 2 * rank + 1]])]
            evaluator.process(inputs, outputs)
        metrics = evaluator.evaluate()
        (folder / f"rank{rank} {protocol}.json").write_text(json.dumps(metrics))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_same_numbers(tmp_path):
    """To the last digit, whatever counts, although each scores half of the classes; and the same
    predictions in the same order. Scores tie, and caps cut through the ties."""
    rng = fresh_rng()
    truth = scene(rng, images=20)
    for image in truth["images"]:
        image["neg_category_ids"] = [int(c) for c in rng.choice(CATEGORY_IDS, 2, replace=False)]
        image["not_exhaustive_category_ids"] = []
    batches = detect(rng, truth)
    for _, [output] in batches:
        output["instances"].scores = (output["instances"].scores * 4).round() / 4
    max_dets = {"coco": 2, "lvis": 3, "lvis-fixed": 12}
    names = {protocol: register(truth, tmp_path) for protocol in max_dets}
    mp.start_processes(
        run_rank, (2, tmp_path, names, batches, max_dets), nprocs=2, start_method="fork", join=True
    )
    counts = {}
    for protocol, most in max_dets.items():
        evaluator = DetectionEvaluator(
            names[protocol], tmp_path / f"one {protocol}", protocol=protocol, max_dets=most
        )
        evaluator.reset()
        for inputs, outputs in batches:
            outputs[0].pop("routings", None)
            evaluator.process(inputs, outputs)
        expected = evaluator.evaluate()
        assert json.loads((tmp_path / f"rank1 {protocol}.json").read_text()) == {}
        metrics = json.loads((tmp_path / f"rank0 {protocol}.json").read_text())
        assert {k: v for k, v in metrics.items() if "routing" not in k} == expected, protocol
        one, two = (tmp_path / f"{n} {protocol}" for n in ("one", "two"))
        found = (one / "predictions.json").read_text()
        assert found == (two / "predictions.json").read_text(), protocol
        counts[protocol] = len(json.loads(found))
        results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
        assert results[0]["per_class"] == results[1]["per_class"] and 0 < expected["AP"] < 100
    assert (
        counts["lvis-fixed"]
        < counts["coco"]
        == sum(len(output["instances"]) for _, [output] in batches)
    )
    layer = results[1]["routing"][0]
    assert layer["load"] == pytest.approx([0.25] * 4)


def test_fixed_ap_keeps_no_more_than_can_count(tmp_path, monkeypatch):
    """In any order of the images, and with ties, the same detections are kept."""
    rng = fresh_rng()
    truth = scene(rng, images=30)
    for category, letter in zip(truth["categories"], "rcff", strict=True):
        category["frequency"] = letter
    for image in truth["images"]:
        image["neg_category_ids"] = [int(c) for c in rng.choice(CATEGORY_IDS, 2, replace=False)]
        image["not_exhaustive_category_ids"] = []
    batches = detect(rng, truth)
    for _, [output] in batches:
        output["instances"].scores = (output["instances"].scores * 4).round() / 4
    expected = lvis_ap(truth, as_predictions(batches), fixed=True, max_dets=10)
    monkeypatch.setattr("dynamic_dino.evaluation.evaluator.PRUNE_EVERY", 20)
    name = register(truth, tmp_path, evaluator_type="lvis", frequency=list("rcff"))
    for n in range(3):
        evaluator = DetectionEvaluator(name, tmp_path / "out", max_dets=10)
        evaluator.reset()
        for i in rng.permutation(len(batches)) if n else range(len(batches)):
            evaluator.process(*batches[i])
        assert sum(map(len, evaluator._parts)) <= 4 * 10 + 20 + 5
        assert dict(evaluator.evaluate()) == pytest.approx(expected.metrics)
        found = [p["category_id"] for p in as_predictions(batches)]
        kept = sum(min(found.count(c), 10) for c in CATEGORY_IDS)
        assert len(json.loads((tmp_path / "out/predictions.json").read_text())) == kept
    text = (tmp_path / "out/results.txt").read_text()
    assert "fixed AP: at most 10 detections per class" in text and "rare" in text


def test_an_unknown_protocol_is_named():
    with pytest.raises(ValueError, match="unknown protocol 'voc': use one of coco, lvis"):
        DetectionEvaluator("any", protocol="voc")


def test_bad_input_is_named(tmp_path):
    rng = fresh_rng()
    truth = scene(rng)
    (inputs, outputs), *_ = detect(rng, truth)
    evaluator = DetectionEvaluator(register(truth, tmp_path))
    evaluator.reset()
    evaluator.process(inputs, outputs)
    with pytest.raises(ValueError, match="image 0 was evaluated twice: 0.jpg"):
        evaluator.process(inputs, outputs)

    evaluator.reset()
    outputs[0]["instances"].scores[0] = float("nan")
    with pytest.raises(ValueError, match="not finite on 0.jpg"):
        evaluator.process(inputs, outputs)
    with pytest.raises(ValueError, match="0.jpg .* no 'prompt_classes'"):
        evaluator.process([{"image_id": 3, "file_name": "0.jpg"}], outputs)

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't write to .*/file/out .*output_dir to another"):
        DetectionEvaluator(register(truth, tmp_path), tmp_path / "file" / "out").reset()

    truth["categories"].append({"id": 99, "name": "stranger"})
    with pytest.raises(ValueError, match=r"other categories .* ids \[99\]"):
        DetectionEvaluator(register(truth, tmp_path)).reset()
    MetadataCatalog.get(name := f"captions_{uuid.uuid4().hex}").thing_classes = []
    with pytest.raises(ValueError, match="has no categories to score"):
        DetectionEvaluator(name).reset()
    with pytest.raises(ValueError, match="unknown data set 'nobody registered it'"):
        DetectionEvaluator("nobody registered it").reset()
