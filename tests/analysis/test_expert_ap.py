"""AP of single experts against plain loops over classes, thresholds, detections and objects."""

import numpy as np
import pytest
from dynamic_dino.analysis.collect import LayerCounts
from dynamic_dino.analysis.expert_ap import dominant_route, expert_table
from dynamic_dino.analysis.objects import objects_of
from dynamic_dino.evaluation import coco_ap, lvis_ap


def overlap(a, b, crowd):
    """IoU of x, y, w, h; of a crowd: the share of the detection that lies in it."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(w, 0) * max(h, 0)
    return common / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - common)


def plain_ap(detections, objects, ignored, classes, small=False):
    """COCO's AP in percent of (image, class, box, score) and of annotations.

    ignored: of which objects it doesn't matter whether they are found. With `small`, detections
    that find nothing and aren't small don't count either.
    """
    values = []
    for category in classes:
        mine = [o for o in objects if o["category_id"] == category]
        total = sum(not ignored(o) for o in mine)
        if not total:
            continue
        ranked = sorted((d for d in detections if d[1] == category), key=lambda d: -d[3])
        for threshold in np.linspace(0.5, 0.95, 10):
            taken, outcome = set(), []
            for image, _, box, _ in ranked:
                best, best_iou = None, threshold
                for pass_ignored in (False, True):  # one that counts goes before one that doesn't
                    for k, o in enumerate(mine):
                        if o["image_id"] != image or ignored(o) != pass_ignored:
                            continue
                        if k in taken and not o["iscrowd"]:
                            continue
                        iou = overlap(box, o["bbox"], o["iscrowd"])
                        if iou >= best_iou:
                            best, best_iou = k, iou
                    if best is not None:
                        break
                if best is None:
                    if not small or box[2] * box[3] <= 32**2:
                        outcome.append(False)
                else:
                    taken.add(best)
                    if not ignored(mine[best]):
                        outcome.append(True)
            found = np.cumsum(outcome)
            precision = found / np.arange(1, len(outcome) + 1)
            recall = found / total
            for r in np.linspace(0, 1, 101):
                later = [p for p, q in zip(precision, recall, strict=True) if q >= r]
                values.append(max(later, default=0.0))
    return 100 * float(np.mean(values)) if values else -1.0


def test_every_number_of_the_table(scene):
    collection = scene()
    objects = objects_of(collection)
    found = collection.predictions
    detections = list(
        zip(
            found.image_ids.tolist(),
            found.category_ids.tolist(),
            found.boxes.tolist(),
            found.scores.tolist(),
            strict=True,
        )
    )
    classes = [c["id"] for c in collection.truth["categories"]]
    flags = {
        id(a): {"small": s, "occluded": o, "tail": t, "owner": w}
        for a, s, o, t, w in zip(
            objects.annotations,
            objects.small,
            objects.occluded,
            objects.tail,
            objects.owner,
            strict=True,
        )
    }
    rows = expert_table(collection, objects)
    assert [row.expert for row in rows] == [None, 0, 1, 2, 3, 4]
    for row in rows:
        expert = row.expert

        def takes(detection, expert=expert):
            return expert is None or expert in collection.experts[detection, -1].tolist()

        def owned(annotation, takes=takes, expert=expert):
            owner = flags[id(annotation)]["owner"]
            return expert is None or (owner >= 0 and takes(owner))

        mine = [d for k, d in enumerate(detections) if takes(k)]
        for subset in ("all", "small", "occluded", "tail"):

            def wanted(a, subset=subset, owned=owned):
                if a["iscrowd"] or not owned(a):
                    return False
                return subset == "all" or bool(flags[id(a)][subset])

            annotations = collection.truth["annotations"]
            assert row.objects[subset] == sum(wanted(a) for a in annotations)
            expected = plain_ap(
                mine,
                annotations,
                lambda a, wanted=wanted: not wanted(a),
                classes,
                small=subset == "small",
            )
            assert row.ap[subset] == pytest.approx(expected, abs=1e-6), (expert, subset)
    load = collection.layers[-1].load
    assert [row.load for row in rows[1:]] == pytest.approx((load / load.sum()).tolist())


def test_the_whole_model_s_row_is_the_data_set_s_ap(scene, rng):
    """By COCO's protocol, crowds and all; and by LVIS's, which is federated and has no crowds."""
    collection = scene()
    everything = expert_table(collection, objects_of(collection))[0]
    expected = coco_ap(collection.truth, collection.predictions).metrics
    assert everything.ap["all"] == pytest.approx(expected["AP"])
    assert everything.ap["small"] == pytest.approx(expected["APs"])

    classes = [c["id"] for c in collection.truth["categories"]]
    for annotation in collection.truth["annotations"]:
        annotation["iscrowd"] = 0
    for image in collection.truth["images"]:
        for field in ("neg_category_ids", "not_exhaustive_category_ids"):
            image[field] = [c for c in classes if rng.random() < 0.3]
    for category in collection.truth["categories"]:
        category["frequency"] = str(rng.choice(["r", "f"]))
    everything = expert_table(collection, objects_of(collection))[0]
    expected = lvis_ap(collection.truth, collection.predictions, fixed=True).metrics
    assert everything.ap["all"] == pytest.approx(expected["AP"])
    assert everything.ap["tail"] == pytest.approx(expected["APr"])


def test_nothing_found(scene):
    collection = scene(images=3)
    collection.predictions = collection.predictions[:0]
    collection.experts = collection.experts[:0]
    objects = objects_of(collection)
    rows = expert_table(collection, objects)
    assert rows[0].ap["all"] == (0 if len(objects) else -1)
    assert all(set(row.ap.values()) == {-1} for row in rows[1:])


def test_the_route_that_most_tokens_come_from():
    routes = np.array([[4, 0, 1], [6, 0, 3], [0, 0, 0]])
    layer = LayerCounts("decoder 0", routes=routes, named=["indoor", "crowd", "2"])
    assert dominant_route(layer, 0) == ("crowd", 0.6)
    assert dominant_route(layer, 1) == (None, None)
    assert dominant_route(layer, 2) == ("crowd", 0.75)
    assert dominant_route(LayerCounts("decoder 0"), 0) == (None, None)


def test_a_decoder_without_experts(scene):
    collection = scene(images=2)
    collection.layers = []
    with pytest.raises(ValueError, match="no MoE layer"):
        expert_table(collection, objects_of(collection))
