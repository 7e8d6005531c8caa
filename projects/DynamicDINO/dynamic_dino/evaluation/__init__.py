from .coco import DetectionResult, class_groups, coco_ap
from .evaluator import DetectionEvaluator
from .loop import inference_on_dataset
from .tables import format_results

__all__ = [
    "DetectionEvaluator",
    "DetectionResult",
    "class_groups",
    "coco_ap",
    "format_results",
    "inference_on_dataset",
]
