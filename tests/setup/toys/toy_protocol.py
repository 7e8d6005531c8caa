"""An evaluation protocol of one's own."""

from dynamic_dino.evaluation.precision_recall import DetectionResult
from dynamic_dino.evaluation.protocols import Protocol


def images_with_a_box(truth, predictions, *, max_dets, groups, image_ids) -> DetectionResult:
    """Percentage of the images in which anything was found."""
    images = [i["id"] for i in truth["images"]] if image_ids is None else list(image_ids)
    found = set(predictions.image_ids.tolist()) & set(images)
    return DetectionResult({"share": 100 * len(found) / len(images)}, [])


PROTOCOL = Protocol(images_with_a_box, 100, "images with a box, of {} at most")
