"""How good the experts of a layer are at what is hard: HI-MoE's Table 8, for any router.

The paper (arXiv 2604.04908, section 4.5) doesn't define the AP of an expert. Here:

- an object is one of expert e if its owner, the query whose box fits it best, took e in the last
  MoE layer of the decoder (`objects.py`);
- the detections of e are those whose query took e;
- AP of e is COCO's, of e's detections and e's objects. Objects of other experts must not be found
  but may be, like those of other sizes in COCO's APs.

With K experts a query, an object and a detection count for K experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..evaluation.lvis import federated
from ..evaluation.precision_recall import average_precision
from ..evaluation.predictions import DatasetPredictions
from .collect import Collection, LayerCounts
from .objects import Objects

SUBSETS = ("all", "small", "occluded", "tail")
MOST = 100  # detections of an image and class, as in COCO


@dataclass
class ExpertRow:
    """Numbers of one expert, or of the whole model (`expert` None).

    ap           percent, by subset: "all", "small", "occluded", "tail"; -1 without such objects
    objects      how many there are, by subset
    load         share of the layer's filled slots
    route        name of the scene route that most of its tokens come from; None without a scene
                 router, or without tokens
    route_share  of its tokens, those of that route
    """

    expert: int | None
    load: float
    ap: dict[str, float]
    objects: dict[str, int]
    route: str | None = None
    route_share: float | None = None


def expert_table(collection: Collection, objects: Objects) -> list[ExpertRow]:
    """The whole model's row, and one for each expert of the decoder's last MoE layer.

    Raises ValueError if the decoder has no MoE layer.
    """
    if not collection.decoder:
        raise ValueError("the decoder has no MoE layer, so no detection belongs to an expert")
    layer = collection.decoder[-1]
    load = layer.load / max(layer.load.sum(), 1)
    everything = np.ones(len(collection.predictions), bool), np.ones(len(objects), bool)
    rows = [ExpertRow(None, 1.0, *subset_ap(collection, objects, *everything))]
    for expert in range(len(load)):
        detections = (collection.experts[:, -1] == expert).any(1)
        mine = np.zeros(len(objects), bool)
        owned = objects.owner >= 0
        mine[owned] = detections[objects.owner[owned]]
        ap, counts = subset_ap(collection, objects, detections, mine)
        route = dominant_route(layer, expert)
        rows.append(ExpertRow(expert, float(load[expert]), ap, counts, *route))
    return rows


def dominant_route(layer: LayerCounts, expert: int) -> tuple[str | None, float | None]:
    """The most frequent scene route among an expert's tokens, and its share of them."""
    if layer.routes is None or not layer.routes[:, expert].sum():
        return None, None
    column = layer.routes[:, expert]
    return layer.named[column.argmax()], float(column.max() / column.sum())


def subset_ap(
    collection: Collection, objects: Objects, detections: np.ndarray, mine: np.ndarray
) -> tuple[dict[str, float], dict[str, int]]:
    """AP in percent, and the number of objects, by subset, of these detections and objects.

    Args:
        detections, mine: bool [N], bool [M]
    """
    predictions, unpunished = collection.predictions[detections], None
    if any("neg_category_ids" in image for image in collection.truth["images"]):  # LVIS
        judged, unpunished = federated(collection.truth, predictions)
        predictions, unpunished = predictions[judged], unpunished[judged]
    metrics = _metrics(collection, objects, predictions, unpunished, mine)
    covered = _metrics(collection, objects, predictions, unpunished, mine & objects.occluded)
    ap = {
        "all": metrics["AP"],
        "small": metrics["APs"],
        "occluded": covered["AP"],
        "tail": metrics["AP_tail"],
    }
    masks = {"small": objects.small, "occluded": objects.occluded, "tail": objects.tail}
    counts = {"all": int(mine.sum())} | {k: int((mine & m).sum()) for k, m in masks.items()}
    return ap, counts


def _metrics(
    collection: Collection,
    objects: Objects,
    predictions: DatasetPredictions,
    unpunished: np.ndarray | None,
    sought: np.ndarray,
) -> dict[str, float]:
    """Of the objects to be found; classes without any are left out, as COCO's mean leaves them."""
    classes = set(objects.category_ids[sought].tolist())
    if not classes:
        return dict.fromkeys(("AP", "APs", "AP_tail"), -1.0)
    sought_ids = {id(objects.annotations[i]) for i in np.flatnonzero(sought)}
    annotations = [
        a if a["iscrowd"] or id(a) in sought_ids else a | {"ignore": 1}
        for a in collection.truth["annotations"]
        if a["category_id"] in classes
    ]
    categories = [c for c in collection.truth["categories"] if c["id"] in classes]
    return average_precision(
        {
            "images": collection.truth["images"],
            "annotations": annotations,
            "categories": categories,
        },
        predictions,
        max_dets={"AR": MOST},
        groups={"_tail": set(objects.category_ids[sought & objects.tail].tolist())},
        ignored=("iscrowd", "ignore"),
        unpunished=unpunished,
    ).metrics
