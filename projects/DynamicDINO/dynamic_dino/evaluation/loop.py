"""The evaluation loop: Detectron2's, with images per second and an ETA in images."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterable

import torch
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)

REPORT_SECONDS = 10.0


def inference_on_dataset(
    model: nn.Module,
    data_loader: Iterable[list[dict]],
    evaluator: DatasetEvaluator | list[DatasetEvaluator],
) -> dict:
    """Runs the model over the loader's batches and returns `evaluator.evaluate()`.

    Same contract as `detectron2.evaluation.inference_on_dataset`. The model is in eval mode
    meanwhile. The speed that it logs is this process's, from the file to the evaluator.
    """
    if isinstance(evaluator, list):
        evaluator = DatasetEvaluators(evaluator)
    evaluator.reset()
    batches, images, waited = len(data_loader), 0, 0.0
    start = reported = before_load = time.perf_counter()
    training = model.training
    try:
        # Not inference_mode: what the model caches here, it may use again in training.
        with torch.no_grad():
            model.eval()
            for done, inputs in enumerate(data_loader, start=1):
                loaded = time.perf_counter()
                waited += loaded - before_load
                # process() moves the boxes to the CPU, which waits for the device.
                evaluator.process(inputs, model(inputs))
                images += len(inputs)
                before_load = time.perf_counter()
                if before_load - reported > REPORT_SECONDS:
                    reported = before_load
                    left = (before_load - start) / done * (batches - done)
                    logger.info(
                        f"Evaluated {images} images, batch {done}/{batches}, "
                        f"{images / (before_load - start):.1f} images/s, "
                        f"ETA {datetime.timedelta(seconds=int(left))}"
                    )
    finally:
        model.train(training)
    seconds = max(time.perf_counter() - start, 1e-9)
    logger.info(
        f"Evaluated {images} images in {seconds:.1f} s: {images / seconds:.1f} images/s per "
        f"process, {100 * waited / seconds:.0f}% of the time waiting for data"
    )
    comm.synchronize()
    return evaluator.evaluate() or {}
