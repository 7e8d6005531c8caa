from detectron2.evaluation import inference_on_dataset  # runs a DetectionEvaluator

from .bootstrap import Interval, bootstrap
from .coco import class_groups, coco_ap
from .evaluator import DetectionEvaluator
from .lvis import lvis_ap
from .operating_point import OperatingPoint, best_point, operating_points
from .precision_recall import DetectionResult
from .prediction_log import PredictionLog
from .predictions import DatasetPredictions
from .protocols import PROTOCOLS
from .refexp import refexp_precision
from .tables import format_results

__all__ = [
    "DetectionEvaluator",
    "DetectionResult",
    "Interval",
    "OperatingPoint",
    "PROTOCOLS",
    "PredictionLog",
    "DatasetPredictions",
    "best_point",
    "bootstrap",
    "class_groups",
    "coco_ap",
    "format_results",
    "inference_on_dataset",
    "lvis_ap",
    "operating_points",
    "refexp_precision",
]
