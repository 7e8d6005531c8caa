"""`DetectionEvaluator`: collects a detector's boxes over a data set and scores them."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from PIL import Image

from ..data.datasets import get_metadata
from ..data.fields import id_array
from ..data.ground_truth import ground_truth
from ..data.once import read_once
from ..files import writable_folder, write_text, written_whole
from ..moe.statistics import RoutingStatistics
from .class_floors import ClassFloors
from .coco import class_groups, read_ground_truth
from .exchange import exchange
from .pictures import results_sheet
from .precision_recall import ClassCurves
from .prediction_log import Found, PredictionLog
from .predictions import DatasetPredictions
from .protocols import DEFAULTS, protocol_named
from .tables import format_results

logger = logging.getLogger(__name__)

# Detections of all processes, after which those that can't count any more are dropped.
PRUNE_EVERY = 4_000_000
PLACES = 2**40  # more than the detections of a process


class DetectionEvaluator(DatasetEvaluator):
    """Scores of a registered data set by one of the `PROTOCOLS`: COCO AP, LVIS AP or fixed AP (with
    rare / common / frequent and seen / novel classes), or P@k of referring expressions.

    Each input needs "image_id" and "prompt_classes", the contiguous data set class of every phrase
    of its prompt (`TestMapper` gives both). Each output has "instances" with pred_boxes (XYXY,
    pixels of the original image), scores, and pred_classes (index of the phrase). A class that an
    image's prompt doesn't name can't be detected there: its objects count as missed, and a warning
    says how many. Images that were not processed are left out, also with a warning. "routings" on
    a batch's first output are summarised for each MoE layer, see `RoutingStatistics`.

    Args:
        dataset_name: registered name; its metadata gives json_file, thing_classes,
            thing_dataset_id_to_contiguous_id, and optionally frequency, novel and evaluator_type.
        output_dir: where predictions.json (COCO results format), results.json, results.txt and
            pictures.jpg (`results_sheet`, of images that the main process saw) go; None writes
            nothing.
        protocol: "coco", "lvis", "lvis-fixed", "refexp", or the import path of a `Protocol` of
            your own. Default: "lvis-fixed" for LVIS, "refexp" for RefCOCO, "coco" for all others.
        max_dets: detections that count, per image and class ("coco": 100), per image ("lvis": 300)
            or per class ("lvis-fixed": 10,000, of which no more are kept either).
        detector: settings of the detector that belong to the protocol, such as max_phrases;
            whoever runs the evaluation makes them (`dynamic_dino.engine.evaluate.do_test`).

    `source`, weights and iteration that are scored, stands in the results if whoever runs the
    evaluation sets it.
    """

    source: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path | None = None,
        *,
        protocol: str | None = None,
        max_dets: int | None = None,
        detector: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset_name = dataset_name
        self.output_dir = Path(output_dir) if output_dir else None
        self.protocol, self.max_dets = protocol, max_dets
        if protocol is not None:
            protocol_named(protocol)
        self.detector = dict(detector or {})
        self._log: PredictionLog | None = None

    def use_log(self, log: PredictionLog) -> None:
        """From the next `reset` on, starts with what is in `log`, of an interrupted evaluation, and
        adds to it what is found."""
        self._log = log

    def reset(self) -> None:
        """Forgets all predictions; reads the ground truth and checks that results can be written.

        Both now, so that what is wrong with them shows before hours of inference, not after.
        """
        self._parts: list[DatasetPredictions] = []
        self._unpruned = 0  # detections in them that were not looked at whether they can count
        self._prompted: dict[int | str, tuple[int, ...]] = {}  # contiguous classes, by image id
        self._files: dict[int | str, str] = {}  # by image id, of this process
        self._known_prompts: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._routing = RoutingStatistics()
        self._metadata = get_metadata(self.dataset_name)
        kind = self._metadata.get("evaluator_type")
        self._protocol_name = self.protocol or DEFAULTS.get(kind, "coco")
        self._protocol = protocol_named(self._protocol_name)
        self._most = self._protocol.max_dets if self.max_dets is None else self.max_dets
        # P@k heeds no category: the one phrase is MDETR's one category
        refexp = self._protocol_name == "refexp"
        self._category_ids = [1] if refexp else category_ids_of(self.dataset_name)
        if comm.is_main_process():
            self._truth = self._read_truth()
            if self.output_dir:
                writable_folder(self.output_dir, "set the evaluator's output_dir to another folder")
        self._floors = None
        if self._protocol.keep is DatasetPredictions.best_per_class:
            notes = self._log.notes if self._log else None
            self._floors = ClassFloors(self._category_ids, self._most, notes)
        for found in self._log.earlier() if self._log else ():
            self._add(found)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        images, prompts, parts = [], [], []
        for sample, output in zip(inputs, outputs, strict=True):
            where = f"{sample.get('file_name')} of {self.dataset_name}"
            if "prompt_classes" not in sample:
                raise ValueError(
                    f"the sample of {where} has no 'prompt_classes', so its phrases can't be "
                    "scored: evaluate with TestMapper"
                )
            if sample["image_id"] in self._prompted or sample["image_id"] in images:
                raise ValueError(f"image {sample['image_id']} was evaluated twice: {where}")
            images.append(sample["image_id"])
            self._files[sample["image_id"]] = sample.get("file_name", "")
            prompts.append(tuple(sample["prompt_classes"]))
            parts.append(predictions_of(sample, output["instances"], self._category_ids, where))
        statistics = RoutingStatistics()
        if outputs and outputs[0].get("routings"):
            statistics.update(outputs[0]["routings"])
        counts = [len(part) for part in parts]
        found = Found(images, prompts, counts, DatasetPredictions.cat(parts), statistics.state())
        if self._floors:
            found = found.only(self._floors.reached(found.predictions))
        if self._log:
            self._log.append(found)
        self._add(found)

    def _add(self, found: Found) -> None:
        for image, prompt in zip(found.images, found.prompts, strict=True):
            # Most data sets ask every image for the same names: keep one tuple, not one per image.
            self._prompted[image] = self._known_prompts.setdefault(prompt, prompt)
        self._parts.append(found.predictions)
        self._unpruned += len(found.predictions)
        if self._unpruned > PRUNE_EVERY / comm.get_world_size():
            self._parts = [self._kept(self._parts)]
            self._unpruned = 0
            if self._floors:
                self._floors.raise_by(self._parts[0])
        if found.routing:
            part = RoutingStatistics.of(found.routing)
            self._routing = RoutingStatistics.merged([self._routing, part])

    def _kept(self, parts: list[DatasetPredictions]) -> DatasetPredictions:
        """All predictions, sorted by image: which of equally scored ones count then doesn't depend
        on how the images were divided between processes and runs."""
        predictions = DatasetPredictions.cat(parts)
        predictions = predictions[np.argsort(predictions.image_ids, kind="stable")]
        keep = self._protocol.keep
        return predictions if keep is None else keep(predictions, self._most)

    def evaluate(self) -> OrderedDict[str, float]:
        """Flat metrics in percent on the main process (-1: no ground truth), {} on the others.

        Collective: every process must call it. They share the classes; each needs all that was
        found of its own.
        """
        mine = self._kept(self._parts)
        prompted = _merge(comm.gather(self._prompted))
        routing = comm.gather(self._routing)
        if comm.is_main_process():
            self._warn_of_gaps(prompted)
        frequency, novel = self._metadata.get("frequency"), self._metadata.get("novel")
        groups = class_groups(self._category_ids, frequency, novel)
        curves = None
        if self._protocol.curves is not None:
            curves, mine = self._by_class(mine, prompted)
            if not self.output_dir:
                mine = mine[:0]
        parts = comm.gather(mine)
        if not comm.is_main_process():
            return OrderedDict()
        predictions = self._kept(parts)
        if curves is not None:
            result = curves.result(groups)
        else:
            result = self._protocol.score(
                self._truth,
                predictions,
                max_dets=self._most,
                groups=groups,
                image_ids=prompted.keys(),
            )

        results = {
            "dataset": self.dataset_name,
            "protocol": self._protocol_name,
            **self.source,
            "images": len(prompted),
            "objects": sum(c["objects"] for c in result.per_class),
            "max_dets": self._most,
            "metrics": result.metrics,
            "routing": RoutingStatistics.merged(routing).summary(),
            "per_class": self._label(result.per_class, frequency, novel),
        }
        logger.info(format_results(results, max_classes=60))
        if self.output_dir:
            predictions.write(self.output_dir / "predictions.json")
            write_text(self.output_dir / "results.json", json.dumps(results, indent=1))
            write_text(self.output_dir / "results.txt", format_results(results) + "\n")
            logger.info("Full tables: %s", self.output_dir / "results.txt")
            self._draw(predictions)
        routing_scalars = {
            f"routing/layer{i}/{key}": value
            for i, layer in enumerate(results["routing"])
            for key, value in layer.items()
            if isinstance(value, int | float)
        }
        return OrderedDict(result.metrics | routing_scalars)

    def _by_class(
        self, mine: DatasetPredictions, prompted: Mapping[int | str, Any]
    ) -> tuple[ClassCurves | None, DatasetPredictions]:
        """Each of the n processes scores every n-th class, of which all that was found comes to it.

        Returns the curves of all classes, on the main process; and what of `mine` counts.

        mine      what this process found, of whole images
        prompted  what was asked for in all images that were processed, on the main process
        """
        world = comm.get_world_size()
        owner = {category: i % world for i, category in enumerate(sorted(self._category_ids))}
        counted = self._protocol.whole(mine, self._most)
        counted = replace(counted, rows=np.arange(len(counted)) + comm.get_rank() * PLACES)
        classes, which = np.unique(counted.category_ids, return_inverse=True)
        owners = np.array([owner[c] for c in classes.tolist()], dtype=int)[which]
        found = self._kept(exchange([counted[owners == rank] for rank in range(world)]))
        tasks: list = [None] * world
        if comm.is_main_process():
            tasks = [(_of_classes(self._truth, owner, i), list(prompted)) for i in range(world)]
        truth, images = exchange(tasks)[0]
        curves = None
        if truth["categories"]:
            curves = self._protocol.curves(truth, found, max_dets=self._most, image_ids=images)
        everyones = [part for part in comm.gather(curves) if part is not None]
        if self._protocol.keep is not None:  # says so to the processes that it came from
            source = found.rows // PLACES
            rows = exchange([found.rows[source == rank] % PLACES for rank in range(world)])
            mine = replace(counted[np.sort(np.concatenate(rows))], rows=None)
        return ClassCurves.merged(everyones) if everyones else None, mine

    def _draw(self, predictions: DatasetPredictions) -> None:
        names = dict(zip(self._category_ids, self._metadata.thing_classes, strict=False))
        sheet = results_sheet(self._truth, predictions, self._files, names)
        if sheet is not None:
            path = self.output_dir / "pictures.jpg"
            with written_whole(path, binary=True) as file:
                Image.fromarray(sheet).save(file, "JPEG", quality=90)
            logger.info("Pictures: %s", path)

    def _read_truth(self) -> dict:
        source = ground_truth(self.dataset_name)
        files = [] if isinstance(source, dict) else [source]
        truth = read_once(("truth", self.dataset_name), files, lambda: read_ground_truth(source))
        if self._protocol_name == "refexp":
            return truth
        strangers = {c["id"] for c in truth["categories"]} ^ set(self._category_ids)
        if strangers:
            raise ValueError(
                f"data set {self.dataset_name} was registered with other categories than those in "
                f"{self._metadata.get('json_file')}: they differ in the ids {sorted(strangers)[:5]}"
            )
        return truth

    def _warn_of_gaps(self, prompted: dict[int, tuple[int, ...]]) -> None:
        if len(prompted) < len(self._truth["images"]):
            logger.warning(
                f"{self.dataset_name}: {len(prompted)} of {len(self._truth['images'])} images were "
                "processed; the others are left out of the scores"
            )
        if self._protocol_name == "refexp":
            return
        asked = {
            prompt: {self._category_ids[c] for c in prompt} for prompt in set(prompted.values())
        }
        missing = [
            a["category_id"]
            for a in self._truth["annotations"]
            if a["image_id"] in prompted
            and not a["iscrowd"]
            and a["category_id"] not in asked[prompted[a["image_id"]]]
        ]
        if missing:
            logger.warning(
                f"{self.dataset_name}: {len(missing)} objects of {len(set(missing))} classes are "
                "not named in their image's prompt; they count as missed"
            )

    def _label(self, per_class: list[dict], frequency, novel) -> list[dict]:
        position = {category: i for i, category in enumerate(self._category_ids)}
        for row in per_class:
            if frequency:
                row["frequency"] = frequency[position[row["id"]]]
            if novel:
                row["novel"] = bool(novel[position[row["id"]]])
        return per_class


def _of_classes(truth: dict, owner: Mapping[int, int], rank: int) -> dict:
    """The part of the ground truth of a process's classes; of all images."""
    return truth | {
        "annotations": [a for a in truth["annotations"] if owner[a["category_id"]] == rank],
        "categories": [c for c in truth["categories"] if owner[c["id"]] == rank],
    }


def category_ids_of(dataset_name: str) -> list[int]:
    """Contiguous class -> category id of the JSON file. Raises ValueError where there are none."""
    mapping = get_metadata(dataset_name).get("thing_dataset_id_to_contiguous_id")
    if not mapping:
        raise ValueError(
            f"data set {dataset_name} has no categories to score (its metadata lacks "
            "thing_dataset_id_to_contiguous_id): COCO AP needs a COCO .json file"
        )
    return [category for category, _ in sorted(mapping.items(), key=lambda item: item[1])]


def predictions_of(
    sample: dict, instances: Instances, category_ids: Sequence[int], where: str
) -> DatasetPredictions:
    """What was found in one image, in the order of `instances`.

    Args:
        sample: has "image_id", and the class of each phrase of its prompt, "prompt_classes".
        category_ids: contiguous class -> category id.
        where: names the image in the error.

    Raises ValueError if a box or a score is not finite.
    """
    boxes = instances.pred_boxes.tensor.detach().float().cpu().numpy()
    scores = instances.scores.detach().float().cpu().numpy()
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError(
            f"the detector's boxes or scores are not finite on {where}: its weights are damaged, "
            "or its training diverged; take earlier weights, or train with a lower optimizer.lr"
        )
    asked = id_array(category_ids[c] for c in sample["prompt_classes"])
    return DatasetPredictions(
        id_array([sample["image_id"]] * len(scores)),
        asked[instances.pred_classes.long().cpu().numpy()],
        np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
        scores,
    )


def _merge(parts: list[dict]) -> dict:
    merged: dict = {}
    for part in parts:
        twice = merged.keys() & part.keys()
        if twice:
            raise ValueError(
                f"images {sorted(twice)[:5]} were evaluated by two processes: the test loader must "
                "give each image to one process (Detectron2's InferenceSampler)"
            )
        merged |= part
    return merged
