"""`DetectionEvaluator`: collects a detector's boxes over a data set and scores them."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from pathlib import Path

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data.datasets import get_metadata
from ..files import writable_folder, write_text
from ..moe.statistics import RoutingStatistics
from .coco import class_groups, coco_ap, read_ground_truth
from .tables import format_results

logger = logging.getLogger(__name__)


class DetectionEvaluator(DatasetEvaluator):
    """COCO AP of a registered data set, with rare / common / frequent and seen / novel classes.

    Each input needs "image_id" and "prompt_classes", the contiguous data set class of every phrase
    of its prompt (`TestMapper` gives both). Each output has "instances" with pred_boxes (XYXY,
    pixels of the original image), scores, and pred_classes (index of the phrase). A class that an
    image's prompt doesn't name can't be detected there: its objects count as missed, and a warning
    says how many. Images that were not processed are left out, also with a warning. "routings" on
    a batch's first output are summarised for each MoE layer, see `RoutingStatistics`.

    Args:
        dataset_name: registered name; its metadata gives json_file, thing_classes,
            thing_dataset_id_to_contiguous_id, and optionally frequency and novel.
        output_dir: where predictions.json (COCO results format), results.json and results.txt go;
            None writes nothing.
        max_dets: detections per image and class that count (COCO: 100, LVIS: 300).
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path | None = None,
        *,
        max_dets: int = 100,
    ) -> None:
        self.dataset_name = dataset_name
        self.output_dir = Path(output_dir) if output_dir else None
        self.max_dets = max_dets

    def reset(self) -> None:
        """Forgets all predictions; reads the ground truth and checks that results can be written.

        Both now, so that what is wrong with them shows before hours of inference, not after.
        """
        self._predictions: dict[int, list[dict]] = {}  # by image id
        self._prompted: dict[int, tuple[int, ...]] = {}  # by image id, contiguous classes asked for
        self._known_prompts: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._routing = RoutingStatistics()
        self._metadata = get_metadata(self.dataset_name)
        self._category_ids = self._read_category_ids()
        if comm.is_main_process():
            self._truth = self._read_truth()
            if self.output_dir:
                writable_folder(self.output_dir, "set the evaluator's output_dir to another folder")

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for sample, output in zip(inputs, outputs, strict=True):
            self._process_image(sample, output["instances"])
        if outputs and outputs[0].get("routings"):
            self._routing.update(outputs[0]["routings"])

    def _process_image(self, sample: dict, instances) -> None:
        image_id, where = sample["image_id"], f"{sample.get('file_name')} of {self.dataset_name}"
        if "prompt_classes" not in sample:
            raise ValueError(
                f"the sample of {where} has no 'prompt_classes', so its phrases can't be scored: "
                "evaluate with TestMapper"
            )
        if image_id in self._predictions:
            raise ValueError(f"image {image_id} was evaluated twice: {where}")

        prompt = tuple(sample["prompt_classes"])
        # Most data sets ask every image for the same names: keep one tuple, not one per image.
        self._prompted[image_id] = prompt = self._known_prompts.setdefault(prompt, prompt)

        boxes = instances.pred_boxes.tensor.detach().cpu().double()
        scores = instances.scores.detach().cpu().double()
        if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
            raise ValueError(f"the detector's boxes or scores are not finite on {where}")
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        self._predictions[image_id] = [
            {
                "image_id": image_id,
                "category_id": self._category_ids[prompt[phrase]],
                "bbox": box,
                "score": score,
            }
            for box, score, phrase in zip(
                boxes.tolist(), scores.tolist(), instances.pred_classes.tolist(), strict=True
            )
        ]

    def evaluate(self) -> OrderedDict[str, float]:
        """Flat metrics in percent on the main process (-1: no ground truth), {} on the others.

        Collective: every process must call it.
        """
        predictions = _merge(comm.gather(self._predictions))
        prompted = _merge(comm.gather(self._prompted))
        routing = comm.gather(self._routing)
        if not comm.is_main_process():
            return OrderedDict()

        self._warn_of_gaps(prompted)
        detections = [d for image_id in sorted(predictions) for d in predictions[image_id]]
        frequency, novel = self._metadata.get("frequency"), self._metadata.get("novel")
        result = coco_ap(
            self._truth,
            detections,
            max_dets=self.max_dets,
            groups=class_groups(self._category_ids, frequency, novel),
            image_ids=predictions.keys(),
        )

        results = {
            "dataset": self.dataset_name,
            "images": len(predictions),
            "objects": sum(c["objects"] for c in result.per_class),
            "max_dets": self.max_dets,
            "metrics": result.metrics,
            "routing": RoutingStatistics.merged(routing).summary(),
            "per_class": self._label(result.per_class, frequency, novel),
        }
        logger.info(format_results(results, max_classes=60))
        if self.output_dir:
            write_text(self.output_dir / "predictions.json", json.dumps(detections))
            write_text(self.output_dir / "results.json", json.dumps(results, indent=1))
            write_text(self.output_dir / "results.txt", format_results(results) + "\n")
            logger.info("Full tables: %s", self.output_dir / "results.txt")
        routing_scalars = {
            f"routing/layer{i}/{key}": value
            for i, layer in enumerate(results["routing"])
            for key, value in layer.items()
            if isinstance(value, int | float)
        }
        return OrderedDict(result.metrics | routing_scalars)

    def _read_category_ids(self) -> list[int]:
        """Contiguous class -> category id of the JSON file."""
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if not mapping:
            raise ValueError(
                f"data set {self.dataset_name} has no categories to score (its metadata lacks "
                "thing_dataset_id_to_contiguous_id): COCO AP needs a COCO .json file"
            )
        return [category for category, _ in sorted(mapping.items(), key=lambda item: item[1])]

    def _read_truth(self) -> dict:
        truth = read_ground_truth(self._metadata.json_file)
        strangers = {c["id"] for c in truth["categories"]} ^ set(self._category_ids)
        if strangers:
            raise ValueError(
                f"data set {self.dataset_name} was registered with other categories than those in "
                f"{self._metadata.json_file}: they differ in the ids {sorted(strangers)[:5]}"
            )
        return truth

    def _warn_of_gaps(self, prompted: dict[int, tuple[int, ...]]) -> None:
        if len(prompted) < len(self._truth["images"]):
            logger.warning(
                f"{self.dataset_name}: {len(prompted)} of {len(self._truth['images'])} images were "
                "processed; the others are left out of the scores"
            )
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
