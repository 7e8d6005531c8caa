"""The addresses of the server, as an ASGI application: ``make_app(load_detector())``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, Field

from .. import __version__
from ..data.image_files import allow_in_pillow
from ..data.images import TooManyPixelsError, as_array, open_bytes
from ..modeling.prompt import Prompt
from ..serving.inference import Detector
from .admission import Closed, Full, Gate, PixelBudget
from .batching import Batcher, Options
from .bodies import HUNG_UP, read_body, request_body
from .metrics import Measured, Metrics
from .unread import Unread

logger = logging.getLogger(__name__)
R = TypeVar("R")
RETRY = {"Retry-After": "1"}


@dataclass(frozen=True)
class Limits:
    """max_batch   most images that go through the model together; None: the detector's batch_size
    max_wait    seconds that an image waits for others, at most
    queue       most requests that are accepted and not yet answered
    max_body    bytes of a request
    max_pixels  of an image; all decoded images together have twice as many at most
    """

    max_batch: int | None = None
    max_wait: float = 0.005
    queue: int = 64
    max_body: int = 20_000_000
    max_pixels: int = 50_000_000


class Detection(BaseModel):
    phrase: str
    score: float = Field(ge=0, le=1)
    box: Annotated[list[float], Field(min_length=4, max_length=4)] = Field(
        description="Left, top, right, bottom, in pixels of the image as a person sees it."
    )


class Found(BaseModel):
    width: int
    height: int
    prompt: list[str] = Field(description="The names that were looked for.")
    detections: list[Detection] = Field(description="Best first.")

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "width": 640,
                    "height": 480,
                    "prompt": ["cow", "horse"],
                    "detections": [
                        {"phrase": "cow", "score": 0.8312, "box": [12.5, 80.0, 310.2, 402.7]}
                    ],
                }
            ]
        }
    }


class Wrong(BaseModel):
    detail: str = Field(description="What is wrong, in a line.")


class Health(BaseModel):
    status: str = Field(examples=["ready", "stopping"])
    model: str


REFUSALS = {
    400: "The body is damaged.",
    408: "The body didn't come in time.",
    413: "The body or the image is too large.",
    415: "The body is neither a form nor JSON.",
    422: "A field is wrong, or the image can't be read.",
    429: "Too many requests are waiting; see Retry-After.",
    500: "The model failed.",
    503: "The server is about to stop; see Retry-After.",
}


def make_app(
    detector: Detector,
    limits: Limits = Limits(),  # noqa: B008 (it is frozen)
    defaults: Options = Options(),  # noqa: B008
    name: str = "",
) -> FastAPI:
    """An application that answers with a detector, which it has for itself: its batch size becomes
    that of `limits`.

    Args:
        defaults: options for requests that don't say; those that are None are the detector's.
        name: what the model is called at /health.
    """
    gate = Gate(limits.queue)
    metrics = Metrics(gate)
    batcher = Batcher(
        detector, limits.max_batch or detector.batch_size, limits.max_wait, metrics.batch.observe
    )
    budget = PixelBudget(2 * limits.max_pixels)
    allow_in_pillow(limits.max_pixels)
    decoders = ThreadPoolExecutor(2, "decoder")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        try:
            await _warm_up(batcher)
            yield
        finally:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
            decoders.shutdown(wait=False)

    app = FastAPI(
        title="Dynamic-DINO",
        version=__version__,
        description="Finds what names say in an image.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.gate = gate
    app.add_middleware(Measured, metrics=metrics, path="/detect")
    app.add_middleware(Unread, most=10 * limits.max_body)

    async def decode(function: Callable[..., R], *arguments: Any) -> R:
        """Runs what reads an image beside the event loop."""
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(decoders, function, *arguments)
        except TooManyPixelsError as error:
            raise HTTPException(
                413, f"{error}: send a smaller one, or start the server with more --max-pixels"
            ) from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    async def detect(asked_image: bytes, prompt: Prompt, options: Options) -> dict:
        image = await decode(open_bytes, asked_image, "of the request", limits.max_pixels)
        async with budget.holding(image.width * image.height):
            array: np.ndarray = await decode(as_array, image)
            try:
                records = await batcher.detect(array, prompt, options)
            except ValueError as error:
                raise HTTPException(422, str(error)) from None
            except Exception:  # the batcher has logged it
                raise HTTPException(500, "the model failed: see the server's log") from None
        height, width = array.shape[:2]
        return {
            "width": width,
            "height": height,
            "prompt": prompt.phrases,
            "detections": records,
        }

    @app.post(
        "/detect",
        response_model=Found,
        summary="Detect",
        description="An image and what to look for, as a form or as JSON. All that is "
        "optional has the server's default.",
        responses={
            status: {"model": Wrong, "description": what} for status, what in REFUSALS.items()
        },
        openapi_extra={"requestBody": request_body()},
    )
    async def post_detect(request: Request) -> Any:
        try:
            with gate.entered():
                asked = await read_body(request, limits.max_body)
                prompt = asked.prompt or _everything(detector)
                options = Options(
                    *(
                        default if own is None else own
                        for own, default in zip(asked.options, defaults, strict=True)
                    )
                )
                return await _unless_gone(request, detect(asked.image, prompt, options))
        except Full:
            raise HTTPException(
                429, f"{gate.limit} requests are waiting: try again later", RETRY
            ) from None
        except Closed:
            raise HTTPException(503, "the server is about to stop", RETRY) from None

    @app.get(
        "/health",
        response_model=Health,
        summary="Ready",
        description="Whether requests are accepted: 503 once the server was told to stop.",
        responses={503: {"model": Health, "description": "The server is about to stop."}},
    )
    async def health(response: Response) -> Any:
        if gate.closed:
            response.status_code = 503
        return {"status": "stopping" if gate.closed else "ready", "model": name}

    @app.get(
        "/health/live",
        response_model=Health,
        summary="Live",
        description="200 as long as the process answers.",
    )
    async def live() -> Any:
        return {"status": "stopping" if gate.closed else "ready", "model": name}

    @app.get(
        "/metrics",
        response_class=Response,
        summary="Metrics",
        description="In Prometheus' text format.",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def get_metrics() -> Response:
        return Response(metrics.page(), media_type=metrics.content_type)

    return app


def _everything(detector: Detector) -> Prompt:
    """All classes of a closed-set detector, for a request without names."""
    try:
        return detector.all_classes()
    except ValueError:
        raise HTTPException(
            422, "nothing to look for: give `names`, one or more, or a `text`"
        ) from None


async def _unless_gone(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """What the work returns; it ends when the client hangs up, so that nothing is computed for
    nobody."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(HUNG_UP, "the client has hung up")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _warm_up(batcher: Batcher) -> None:
    """What is slow once is slow before the first request: kernels are compiled, memory is taken."""
    try:
        prompt = batcher.detector.all_classes()
    except ValueError:
        prompt = Prompt.from_phrases(["object"])
    try:
        await batcher.detect(np.zeros((64, 64, 3), np.uint8), prompt, Options())
    except ValueError as error:
        logger.warning("the detector refuses to warm up: %s", error)
