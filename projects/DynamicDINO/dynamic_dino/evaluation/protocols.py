"""The protocols by their names, for configs and the command line."""

from __future__ import annotations

import pydoc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .coco import coco_ap, coco_curves
from .lvis import PER_CLASS, PER_IMAGE, best_of_images, lvis_ap, lvis_curves, warn_of_cut
from .precision_recall import ClassCurves, DetectionResult
from .predictions import DatasetPredictions
from .refexp import KS, refexp_precision


@dataclass(frozen=True)
class Protocol:
    """How predictions are scored.

    score     (truth, predictions, max_dets=, groups=, image_ids=) -> DetectionResult
    max_dets  detections that count by default, and of what: "{} per image and class"
    keep      what of the predictions can count at all, where they would be too many to keep; None:
              all are kept
    whole     what of the predictions of whole images counts, before classes are looked at alone
    curves    (truth, predictions, max_dets=, image_ids=) -> ClassCurves of the truth's classes, of
              which `score` is the mean: then processes share the classes. None: `score` needs all
    """

    score: Callable[..., DetectionResult]
    max_dets: int
    counted: str
    keep: Callable[[DatasetPredictions, int], DatasetPredictions] | None = None
    whole: Callable[[DatasetPredictions, int], DatasetPredictions] = lambda predictions, max_dets: (
        predictions
    )
    curves: Callable[..., ClassCurves] | None = None


def _refexp(truth, predictions, *, max_dets, groups, image_ids) -> DetectionResult:
    ks = [k for k in KS if k <= max_dets]
    return refexp_precision(truth, predictions, ks=ks, image_ids=image_ids)


PROTOCOLS = {
    "coco": Protocol(coco_ap, 100, "at most {} detections per image and class", curves=coco_curves),
    "lvis": Protocol(
        lvis_ap,
        PER_IMAGE,
        "federated, at most {} detections per image",
        whole=best_of_images,
        curves=lvis_curves,
    ),
    "lvis-fixed": Protocol(
        partial(lvis_ap, fixed=True),
        PER_CLASS,
        "federated, fixed AP: at most {:,} detections per class over all images",
        DatasetPredictions.best_per_class,
        warn_of_cut,
        partial(lvis_curves, fixed=True),
    ),
    "refexp": Protocol(_refexp, max(KS), "one of the k best boxes, k up to {}, has IoU 0.5"),
}
# by what the metadata of a data set call "evaluator_type"
DEFAULTS = {"lvis": "lvis-fixed", "refexp": "refexp"}


def protocol_named(name: str) -> Protocol:
    """One of `PROTOCOLS`, or one of your own by its import path, "my_module.MY_PROTOCOL".

    Raises ValueError for an unknown name.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    found = pydoc.locate(name) if "." in name else None
    if not isinstance(found, Protocol):
        raise ValueError(
            f"unknown protocol {name!r}: use one of {', '.join(PROTOCOLS)}, or the import path of "
            "a Protocol of your own"
        )
    return found
