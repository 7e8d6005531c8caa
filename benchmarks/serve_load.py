#!/usr/bin/env python
"""Load on the server: are requests lost, or answered with others' detections; does memory grow?

    python benchmarks/serve_load.py                                  # half a minute
    python benchmarks/serve_load.py --minutes 10 --sigterm-at 300 --save

Starts ``python -m dynamic_dino.serve`` and many clients at once. Each sends one request after the
other, drawn from a pool of different images, names and options, as forms and as JSON; every fifth
is bad in one of many ways. Every answer is compared with that of the same detector, asked for the
one image alone in this process. With --sigterm-at, a second server is told to stop after so many
seconds, while the clients go on. With --save: ``benchmarks/results/<machine>/serve_load.json``.

Exit status: 0, or 1 if anything was wrong, lost or not told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from typing import NamedTuple

import httpx
import numpy as np
from dynamic_dino import load_detector
from dynamic_dino.console import command
from dynamic_dino.data.image_files import find_images
from dynamic_dino.data.images import as_array
from dynamic_dino.data.synthetic.drawn import NAMES, draw_image
from dynamic_dino.serving.inference import detection_records
from lib.options import add_machine, add_output, new_parser, place_output, use_threads
from lib.provenance import provenance, settings, write_json
from PIL import Image

SCORE, BOX = 0.001, 0.5  # how far detections of a batch may be from those of the image alone
ROUNDED_SCORE, ROUNDED_BOX = 1e-4, 0.1  # the last digit of an answer
SAMPLE_SECONDS = 5
BUSY = (429, 503)


class Asked(NamedTuple):
    """content, type   the body and its media type
    expected   the answer, or the status of a refusal
    threshold  below which detections are left out
    """

    content: bytes
    type: str
    expected: dict | int
    threshold: float = 0.0


@command
def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="nano-x16", help="default: %(default)s")
    parser.add_argument("--images", nargs="+", metavar="IMAGE", help="default: drawn ones")
    parser.add_argument("--minutes", type=float, default=0.5, help="default: %(default)g")
    parser.add_argument("--sigterm-at", type=float, metavar="SECONDS", help="in a second run")
    parser.add_argument("--clients", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=120, help="different ones, in the pool")
    parser.add_argument("--max-batch", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--queue", type=int, default=64, help="default: %(default)s")
    add_machine(parser)
    add_output(parser)
    options = parser.parse_args()
    place_output(options, "serve_load")
    use_threads(options)
    pool = requests_and_answers(options)
    report = provenance(("torch", "fastapi", "uvicorn")) | {"settings": settings(options)}
    report["settings"]["images"] = len(options.images or ()) or "drawn"
    report["runs"] = {"soak": asyncio.run(one_run(options, pool, options.minutes * 60))}
    if options.sigterm_at:
        report["runs"]["SIGTERM in the middle"] = asyncio.run(
            one_run(options, pool, 2 * options.sigterm_at, options.sigterm_at)
        )
    if options.json:
        write_json(options.json, report)
    print(json.dumps({name: summary(run) for name, run in report["runs"].items()}, indent=1))
    return any(faults(run) for run in report["runs"].values())


# ---- requests ----------------------------------------------------------------------------------


def requests_and_answers(options: argparse.Namespace) -> list[Asked]:
    """So many good requests with their answers, and a quarter as many bad ones."""
    rng = np.random.default_rng(0)
    detector = load_detector(options.model, device=options.device)
    if options.images:
        files = find_images(options.images)
        images = [files[i].read_bytes() for i in rng.permutation(len(files))[: options.requests]]
        names = ["person", "car", "dog", "cow", "horse", "bottle", "chair", "red apple"]
    else:
        images, names = [drawn(rng) for _ in range(options.requests // 2)], list(NAMES)
    pool = []
    for i in range(options.requests):
        image = images[i % len(images)]
        asked = [names[k] for k in rng.permutation(len(names))[: rng.integers(1, 7)]]
        threshold = (0.0, 0.05, detector.threshold)[rng.integers(3)]
        found = detector(as_array(Image.open(io.BytesIO(image))), asked, threshold)
        height, width = found.image_size
        answer = {"width": width, "height": height, "prompt": asked}
        answer["detections"] = detection_records(found)
        body = (form, document)[i % 2](image, names=asked, threshold=threshold)
        pool.append(Asked(*body, answer, threshold))
    return pool + [Asked(*body, status) for body, status in bad(images, options.requests // 4)]


def drawn(rng: np.random.Generator) -> bytes:
    picture, _ = draw_image(rng, int(rng.integers(60, 400)))
    picture.save(file := io.BytesIO(), ("PNG", "JPEG", "WEBP")[rng.integers(3)])
    return file.getvalue()


def form(image: bytes, **fields) -> tuple[bytes, str]:
    request = httpx.Request("POST", "http://a", files={"image": ("a", image)}, data=fields)
    return request.read(), request.headers["content-type"]


def document(image: bytes, **fields) -> tuple[bytes, str]:
    document = {"image": base64.b64encode(image).decode(), **fields}
    return json.dumps(document).encode(), "application/json"


def bad(images: list[bytes], count: int) -> list[tuple[tuple[bytes, str], int]]:
    """Bodies that must be refused, and the status that says so."""
    Image.new("1", (9000, 9000)).save(large := io.BytesIO(), "PNG")  # a small file
    result = []
    for i in range(count):
        image = images[i % len(images)]
        ways = [
            (form(image[: len(image) // 3], names=["cow"]), 422),  # cut off
            (form(b"<html>not found</html>", names=["cow"]), 422),
            (form(b"", names=["cow"]), 422),
            (form(image), 422),  # nothing to look for
            (form(image, names=["?"]), 422),
            (form(image, names=["cow"], threshold="high"), 422),
            (document(image, names="cow"), 422),
            ((b'{"image": ', "application/json"), 400),
            ((image, "image/jpeg"), 415),
            (form(large.getvalue(), names=["cow"]), 413),
            (form(bytes(21_000_000), names=["cow"]), 413),
        ]
        result.append(ways[i % len(ways)])
    return result


# ---- a run -------------------------------------------------------------------------------------


class Tally:
    """What became of the requests of all clients."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.seconds: list[float] = []  # of good requests
        self.score = self.box = 0.0  # largest differences from an answer to the image alone
        self.examples: list[str] = []  # of what was wrong
        self.told = float("inf")  # when the server was told to stop

    def fault(self, kind: str, what: str) -> None:
        self.count[kind] += 1
        self.examples = [*self.examples, f"{kind}: {what}"][:5]


async def one_run(
    options: argparse.Namespace, pool: list[Asked], seconds: float, sigterm_at: float | None = None
) -> dict:
    """A server, and clients that send for so many seconds."""
    arguments = ["--model", options.model, "--port", "0", "--device", options.device]
    arguments += ["--max-batch", str(options.max_batch), "--queue", str(options.queue)]
    if options.threads:
        arguments += ["--threads", str(options.threads)]
    server = subprocess.Popen(
        [sys.executable, "-m", "dynamic_dino.serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        said = iter(server.stdout.readline, "")
        url = next(m[1] for line in said if (m := re.search(r"listening on (\S+),", line)))
        # Read all the time: a server whose log nobody reads stops when the pipe is full.
        log = asyncio.create_task(asyncio.to_thread(deque, said, 1))
        start, tally, memory = time.perf_counter(), Tally(), []
        end = start + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:
            watch = asyncio.create_task(watched(client, memory))
            clients = [client_of(client, pool, tally, end, i) for i in range(options.clients)]
            everybody = asyncio.gather(*clients)
            if sigterm_at:
                await asyncio.sleep(sigterm_at)
                tally.told = time.perf_counter()
                server.send_signal(signal.SIGTERM)
            await everybody
            watch.cancel()
            sizes = {} if sigterm_at else await batch_sizes(client)
        if not sigterm_at:
            server.send_signal(signal.SIGTERM)
        last = await asyncio.wait_for(log, 120)
        server.wait(10)
    finally:
        server.kill()
    accepted = re.search(r"stopped: (\d+) requests", " ".join(last))
    times = np.percentile(tally.seconds or [0], (50, 95, 99))
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "clients": options.clients,
        "sigterm_at": sigterm_at,
        **{key: tally.count[key] for key in COUNTS},
        "accepted": int(accepted[1]) if accepted else None,
        "exit_status": server.returncode,
        "largest_differences": {"score": round(tally.score, 5), "box": round(tally.box, 2)},
        "seconds_p50_p95_p99": [round(float(t), 3) for t in times],
        "batch_sizes": sizes,
        "memory_mb": memory,
        "examples": tally.examples,
    }


# equal, close       answered as the image alone: to the last digit, or within `SCORE` and `BOX`
# refused            bad requests, with the status that is theirs
# busy, stopping     429, 503
# not_connected      after the signal: no connection, or one that ended before an answer, for a
#                    request that was sent after it
# wrong, lost        another's answer or status; sent before the signal, and no answer came
COUNTS = "equal", "close", "refused", "busy", "stopping", "not_connected", "wrong", "lost"


async def client_of(
    client: httpx.AsyncClient, pool: list[Asked], tally: Tally, end: float, number: int
) -> None:
    rng = random.Random(number)
    while time.perf_counter() < end:
        asked = rng.choice(pool)
        sent = time.perf_counter()
        try:
            answer = await client.post(
                "/detect", content=asked.content, headers={"content-type": asked.type}
            )
        except httpx.TransportError as error:
            # Of a connection that fails nothing was sent, however early it was begun.
            at = time.perf_counter() if isinstance(error, httpx.ConnectError) else sent
            if at < tally.told:
                tally.fault("lost", repr(error))
                continue
            tally.count["not_connected"] += 1
            await asyncio.sleep(1)
            continue
        if answer.status_code in BUSY:
            tally.count["busy" if answer.status_code == 429 else "stopping"] += 1
            await asyncio.sleep(float(answer.headers["retry-after"]) * rng.uniform(0.5, 1.5))
        elif isinstance(asked.expected, int):
            if answer.status_code == asked.expected and answer.json()["detail"]:
                tally.count["refused"] += 1
            else:
                tally.fault("wrong", f"{answer.status_code} for {asked.expected}: {answer.text}")
        elif answer.status_code != 200:
            tally.fault("wrong", f"{answer.status_code}: {answer.text[:200]}")
        else:
            tally.seconds.append(time.perf_counter() - sent)
            compare(answer.json(), asked, tally)


def compare(answer: dict, asked: Asked, tally: Tally) -> None:
    """Counts an answer as equal, close or wrong."""
    if answer == asked.expected:
        tally.count["equal"] += 1
        return
    same = all(answer[key] == asked.expected[key] for key in ("width", "height", "prompt"))
    score, box = differences(answer["detections"], asked.expected["detections"], asked.threshold)
    tally.score, tally.box = max(tally.score, score), max(tally.box, box)
    if same and score <= SCORE and box <= BOX:
        tally.count["close"] += 1
    else:
        tally.fault("wrong", f"score {score:g}, box {box:g}: {json.dumps(answer)[:300]}")


def differences(found: list[dict], expected: list[dict], threshold: float) -> tuple[float, float]:
    """The largest of scores and of coordinates between detections and their nearest of the same
    phrase on the other side; (inf, inf) if one has none, unless its score is at the threshold or at
    the end of a list that is cut off."""
    worst_score = worst_box = 0.0
    for these, others in ((found, expected), (expected, found)):
        edge = max(threshold, others[-1]["score"] if others else 0.0) + SCORE
        for one in these:
            pairs = [
                (
                    float(np.abs(np.subtract(one["box"], other["box"])).max()),
                    abs(one["score"] - other["score"]),
                )
                for other in others
                if other["phrase"] == one["phrase"]
                and abs(one["score"] - other["score"]) <= SCORE + ROUNDED_SCORE
            ]
            box, score = min(pairs, default=(np.inf, np.inf))
            if one["score"] <= edge and box > BOX:
                continue
            worst_score = max(worst_score, score - ROUNDED_SCORE)
            worst_box = max(worst_box, box - ROUNDED_BOX)
    return max(worst_score, 0.0), max(worst_box, 0.0)


async def watched(client: httpx.AsyncClient, memory: list[float]) -> None:
    """The server's resident memory over time, in MB."""
    while True:
        try:
            page = (await client.get("/metrics")).text
        except httpx.TransportError:
            return
        if found := re.search(r"^process_resident_memory_bytes (\S+)", page, re.M):
            memory.append(round(float(found[1]) / 1e6, 1))
        await asyncio.sleep(SAMPLE_SECONDS)


async def batch_sizes(client: httpx.AsyncClient) -> dict[str, int]:
    """How many batches had at most so many images, of those that had more than the size before."""
    page = (await client.get("/metrics")).text
    sizes, before = {}, 0
    for size, count in re.findall(r'batch_size_bucket\{le="(\d+)\.0"\} (\d+)', page):
        if int(count) > before:
            sizes[size], before = int(count) - before, int(count)
    return sizes


# ---- what it comes to --------------------------------------------------------------------------


def faults(run: dict) -> list[str]:
    """What must not be, in words."""
    answered = sum(run[key] for key in ("equal", "close", "refused"))
    found = [f"{run[key]} {key}" for key in ("wrong", "lost") if run[key]]
    if run["accepted"] != answered:
        found.append(f"the server accepted {run['accepted']} requests, clients have {answered}")
    if run["exit_status"] != 0:
        found.append(f"the server's exit status is {run['exit_status']}")
    return found


def summary(run: dict) -> dict:
    memory = run["memory_mb"]
    short = {key: value for key, value in run.items() if key != "memory_mb"}
    if memory:
        short["memory_mb_first_largest_last"] = [memory[0], max(memory), memory[-1]]
    return short | {"faults": faults(run)}


if __name__ == "__main__":
    sys.exit(main())
