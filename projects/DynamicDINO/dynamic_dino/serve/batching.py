"""Dynamic batching: requests that wait at the same time go through the detector together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import anyio
import numpy as np

from ..data.images import resize_transform
from ..modeling.prompt import Prompt
from ..serving.inference import Detector, detect_each, detection_records

logger = logging.getLogger(__name__)


class Options(NamedTuple):
    """Which detections are kept, as `Detector` takes it; None: its own default."""

    threshold: float | None = None
    max_detections: int | None = None
    nms: float | None = None
    nms_agnostic: bool | None = None


@dataclass(frozen=True)
class Job:
    """An image that waits; those of one `kind` may share a batch."""

    image: np.ndarray
    prompt: Prompt
    kind: tuple
    since: float
    answer: asyncio.Future


class Batcher:
    """Gathers images into batches for a detector, which runs on a thread of its own, one batch
    after the other. Different prompts may share a batch; different options don't, since a call of
    the detector has one set of them; nor do images of different sizes, unless the model pads all to
    one canvas: what else is in a batch must not change a result.

    Args:
        detector: what `load_detector` returns.
        max_batch: most images that go together.
        max_wait: seconds for which an image waits for company, at most.
        on_batch: is told the size of each batch.
    """

    def __init__(
        self,
        detector: Detector,
        max_batch: int,
        max_wait: float,
        on_batch: Callable[[int], object] = lambda size: None,
    ) -> None:
        detector.batch_size = max_batch
        self.detector, self.max_batch, self.max_wait = detector, max_batch, max_wait
        self._on_batch = on_batch
        self._waiting: list[Job] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "detector")

    async def detect(self, image: np.ndarray, prompt: Prompt, options: Options) -> list[dict]:
        """The records of what is found in an image, uint8 [H, W, 3]; see `detection_records`.

        Raises ValueError where the detector refuses the image or the prompt, and what it raises
        where it fails. Who is cancelled leaves the queue.
        """
        loop = asyncio.get_running_loop()
        kind = (options, self._shape(image))
        job = Job(image, prompt, kind, loop.time(), loop.create_future())
        self._waiting.append(job)
        self._arrived.set()
        return await job.answer

    async def run(self) -> None:
        """Works until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                jobs = await self._gathered()
                self._on_batch(len(jobs))
                results = await loop.run_in_executor(self._thread, self._detect, jobs)
                for job, result in zip(jobs, results, strict=True):
                    if job.answer.done():  # its client has hung up
                        continue
                    if isinstance(result, Exception):
                        job.answer.set_exception(result)
                    else:
                        job.answer.set_result(result)
        finally:
            self._thread.shutdown(wait=False)

    async def _gathered(self) -> list[Job]:
        """The image that has waited longest, and others of its kind, taken out of the queue."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            self._waiting = [job for job in self._waiting if not job.answer.done()]
            timeout = None
            if self._waiting:
                first = self._waiting[0]
                jobs = [job for job in self._waiting if job.kind == first.kind][: self.max_batch]
                timeout = first.since + self.max_wait - loop.time()
                if len(jobs) == self.max_batch or timeout <= 0:
                    taken = {id(job) for job in jobs}
                    self._waiting = [job for job in self._waiting if id(job) not in taken]
                    return jobs
            with anyio.move_on_after(timeout):
                await self._arrived.wait()

    def _detect(self, jobs: list[Job]) -> list[list[dict] | Exception]:
        images, prompts = [job.image for job in jobs], [job.prompt for job in jobs]
        options = jobs[0].kind[0]
        try:
            found = detect_each(self.detector, images, prompts, *options, errors=(Exception,))
            results = [f if isinstance(f, Exception) else detection_records(f) for f in found]
        except Exception as error:  # of the records: no client may wait for ever
            results = [error] * len(jobs)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, ValueError):
                logger.error("the detector failed", exc_info=result)
        return results

    def _shape(self, image: np.ndarray) -> tuple[int, int] | None:
        """What the model sees of an image's size, None where that is one canvas for all."""
        if getattr(self.detector.model, "canvas", None):
            return None
        resized = resize_transform(*image.shape[:2], self.detector.size)
        return resized.new_h, resized.new_w
