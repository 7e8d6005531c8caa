"""The server: every accepted request gets its own answer, every bad one a line that says why."""

import asyncio
import base64
import io
import json
import logging
import os
import re
import signal
import struct
import threading
import zlib
from argparse import Namespace
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from dynamic_dino.data.images import TooManyPixelsError, as_array, open_bytes
from dynamic_dino.serve import bodies, cli
from dynamic_dino.serve.admission import PixelBudget
from dynamic_dino.serve.app import Limits, make_app
from dynamic_dino.serve.batching import Options
from dynamic_dino.serve.server import Server, address_of, bound_socket
from dynamic_dino.serving.inference import Detector, detection_records, load_detector
from dynamic_dino.serving.options import public_name
from dynamic_dino.serving.shipped import EXAMPLE_NAMES
from helpers.seeds import examples, fresh_rng
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image


class Echo(torch.nn.Module):
    """Finds a box for each name, which only this image and this name have. "refused" is refused,
    at "broken" the model fails, and while `held` nothing is answered."""

    def __init__(self, canvas=None):
        super().__init__()
        self.canvas, self.batches = canvas, []
        self.free = threading.Event()
        self.free.set()

    def forward(self, batch):
        self.batches.append([sample["image_size"] for sample in batch])
        assert self.free.wait(20)
        outputs = []
        for sample in batch:
            phrases = sample["prompt"].phrases
            if "refused" in phrases:
                raise ValueError("phrase 0 of the prompt is 'refused'")
            if "broken" in phrases:
                raise RuntimeError("out of memory")
            mean = sample["image"].float().mean().item()
            found = Instances((sample["height"], sample["width"]))
            codes = torch.tensor([float(sum(p.encode())) for p in phrases])
            found.pred_boxes = Boxes(torch.stack([codes, codes + 1, codes + mean, codes + 9], 1))
            found.scores = 0.95 - torch.arange(len(phrases)) / 10
            found.pred_classes = torch.arange(len(phrases))
            found.phrases = phrases
            outputs.append({"instances": found})
        return outputs


def picture(width=9, height=7, kind="PNG") -> bytes:
    pixels = fresh_rng().integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), kind)
    return file.getvalue()


def head(width, height) -> bytes:
    """Of a PNG; the pixels are missing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    sum_ = struct.pack(">I", zlib.crc32(chunk))
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + sum_ + bytes(4) + b"IDAT" + bytes(4)
    )


def plain(width, height) -> bytes:
    Image.new("RGB", (width, height)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@asynccontextmanager
async def client_of(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


def form(image, **fields) -> dict:
    return {"files": {"image": ("a.png", image)}, "data": fields}


def document(image, **fields) -> dict:
    return {"json": {"image": base64.b64encode(image).decode(), **fields}}


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it doesn't come")


def test_every_request_gets_its_own_answer(rng):
    """Hundreds at once, of all kinds, bad ones among them: each is answered as if it were alone."""
    model = Echo()
    detector, alone = Detector(model, None), Detector(Echo(), None)
    app = make_app(detector, Limits(max_batch=4, max_wait=0.001, queue=500), name="echo")
    asked = []
    for i in range(150):
        image = picture(*((9, 7), (16, 4))[rng.integers(2)])
        names = [f"name {k}" for k in rng.integers(0, 99, 3)]
        options = {"threshold": 0.9} if rng.integers(2) else {}
        if i % 10 == 3:
            asked.append((form(image[:40], names=names), 422))
        elif i % 10 == 6:
            asked.append((document(image, names=["refused"]), 422))
        elif i % 10 == 9:
            asked.append((form(image, names=["broken"]), 500))
        else:
            kind = (form, document)[rng.integers(2)]
            found = alone(as_array(Image.open(io.BytesIO(image))), names, **options)
            height, width = found.image_size
            answer = {"width": width, "height": height, "prompt": names}
            answer["detections"] = detection_records(found)
            asked.append((kind(image, names=names, **options), answer))

    async def main():
        async with client_of(app) as client:
            answers = await asyncio.gather(*(client.post("/detect", **a) for a, _ in asked))
            return answers, (await client.get("/metrics")).text

    answers, metrics = asyncio.run(main())
    for answer, (_, expected) in zip(answers, asked, strict=True):
        if isinstance(expected, int):
            assert answer.status_code == expected and isinstance(answer.json()["detail"], str)
        else:
            assert answer.status_code == 200 and answer.json() == expected
    sizes = [len(batch) for batch in model.batches]
    assert max(sizes) == 4 and all(len({*batch}) == 1 for batch in model.batches)
    good = sum(isinstance(expected, dict) for _, expected in asked)
    for status, count in (200, good), (422, 30), (500, 15):
        assert f'dynamic_dino_requests_total{{status="{status}"}} {count}.0' in metrics
    assert "dynamic_dino_request_seconds_count 150.0" in metrics
    assert "dynamic_dino_queue_length 0.0" in metrics
    assert re.search(r'batch_size_bucket\{le="1.0"\} \d', metrics)
    assert "process_resident_memory_bytes" in metrics


def test_on_one_canvas_all_sizes_share_a_batch():
    model = Echo(canvas=32)
    app = make_app(Detector(model, 32), Limits(max_batch=3, max_wait=0.5))

    async def main():
        async with client_of(app) as client:
            images = picture(9, 7), picture(7, 9), picture(30, 4)
            await asyncio.gather(
                *(client.post("/detect", **form(i, text="cow. horse.")) for i in images)
            )

    asyncio.run(main())
    assert len(model.batches[-1]) == 3


def test_a_full_queue_and_a_client_that_hangs_up():
    model = Echo()
    app = make_app(Detector(model, None), Limits(queue=3))

    async def main():
        async with client_of(app) as client:
            model.free.clear()
            ask = form(picture(), names="cow")
            waiting = [asyncio.create_task(client.post("/detect", **ask)) for _ in range(3)]
            await until(lambda: app.state.gate.inside == 3)
            refused = await client.post("/detect", **ask)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert (await client.get("/health")).json() == {"status": "ready", "model": ""}
            waiting[2].cancel()
            await until(lambda: app.state.gate.inside == 2)
            model.free.set()
            answers = await asyncio.gather(*waiting[:2])
            assert [answer.status_code for answer in answers] == [200, 200]
            assert (await client.post("/detect", **ask)).status_code == 200

    asyncio.run(main())
    assert len(model.batches) == 1 + 3  # the warm-up, and nothing for who hung up


TOO_MANY = "than 0.01 million: send a smaller one, or start the server with more --max-pixels"
GOOD = picture()
WRONG = {  # what is sent: status, what is said
    "a field too many": (form(GOOD, names="cow", colour="red"), 422, "colour: there is no such"),
    "no name": (form(GOOD), 422, "nothing to look for: give `names`"),
    "both": (document(GOOD, names=["cow"], text="cow"), 422, "not both"),
    "twice": (form(GOOD, text=["cow", "horse"]), 422, "text: was given twice"),
    "no letter": (form(GOOD, names=["cow", "--"]), 422, "names: phrase 1 of the prompt is '--'"),
    "no image": ({"data": {"names": "cow"}, "files": {"b": b""}}, 422, "b: must be a value"),
    "image as text": ({"files": {"image": (None, "x")}}, 422, "image: must be a file"),
    "empty file": (form(b"", names="cow"), 422, "image of the request can't be read, it is empty"),
    "a web page": (form(b"<html>", names="cow"), 422, "it is a web page: fetch the picture"),
    "cut off": (form(picture(50, 50)[:500], names="cow"), 422, "corrupt or truncated"),
    "no base64": ({"json": {"image": "?", "names": ["cow"]}}, 422, "image: is not base64"),
    "threshold": (form(GOOD, names="cow", threshold="2"), 422, "threshold: Input should be less"),
    "a text": (document(GOOD, names="cow"), 422, "names: Input should be a valid array"),
    "strict": (document(GOOD, names=["cow"], nms="0.5"), 422, "nms: Input should be a valid num"),
    "agnostic": (form(GOOD, names="cow", nms_agnostic="yes"), 422, "nms_agnostic needs nms"),
    "no JSON": (
        {"content": b"{", "headers": {"content-type": bodies.JSON}},
        400,
        "the body can't be read: Invalid JSON",
    ),
    "no form": (
        {"content": b"--a", "headers": {"content-type": f"{bodies.FORM}; boundary=b"}},
        400,
        "the form can't be read",
    ),
    "charset": (
        {
            "content": b'--b\r\ncontent-disposition: form-data; name="text"\r\n\r\nx\r\n--b--',
            "headers": {"content-type": f"{bodies.FORM}; boundary=b; charset=undefined"},
        },
        400,
        "the form can't be read",
    ),
    "raw": ({"content": GOOD, "headers": {"content-type": "image/png"}}, 415, "not image/png"),
    "nothing": ({}, 415, "no content type"),
    "body": (form(bytes(30_000), names="cow"), 413, "the body has more than 0.02 MB"),
    "pixels": (form(plain(101, 100), names="cow"), 413, f"101 x 100 pixels, more {TOO_MANY}"),
    "bomb": (form(head(60_000, 60_000), names="cow"), 413, f"has more pixels {TOO_MANY}"),
}


def test_wrong_requests_are_told_what_is_wrong(monkeypatch):
    app = make_app(Detector(Echo(), None), Limits(max_body=20_000, max_pixels=10_000))

    async def main():
        async with client_of(app) as client:
            for case, (request, status, words) in WRONG.items():
                answer = await client.post("/detect", **request)
                assert answer.status_code == status, (case, answer.text)
                assert words in answer.json()["detail"], (case, answer.text)

            async def endless():
                while True:
                    yield bytes(9_000)

            answer = await client.post(
                "/detect", content=endless(), headers={"content-type": bodies.JSON}
            )
            assert answer.status_code == 413

            async def slow():
                yield b"{"
                await asyncio.sleep(20)

            monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)
            answer = await client.post(
                "/detect", content=slow(), headers={"content-type": bodies.JSON}
            )
            assert answer.status_code == 408 and "0.05 seconds" in answer.json()["detail"]

    asyncio.run(main())


def test_what_the_description_shows_is_answered():
    app = make_app(Detector(Echo(), None), defaults=Options(threshold=0.9))

    async def main():
        async with client_of(app) as client:
            description = (await client.get("/openapi.json")).json()
            body = description["paths"]["/detect"]["post"]["requestBody"]["content"]
            fields = body[bodies.JSON]["schema"]["properties"]
            request = {key: fields[key]["examples"][0] for key in ("image", "names")}
            answer = await client.post("/detect", json=request)
            assert answer.status_code == 200
            assert [d["phrase"] for d in answer.json()["detections"]] == [EXAMPLE_NAMES[0]]
            request = {"image": f"data:image/png;base64,{request['image']}", "threshold": 0}
            answer = await client.post("/detect", json=request | {"text": "cow. horse."})
            assert answer.json()["prompt"] == ["cow", "horse"]
            assert len(answer.json()["detections"]) == 2
            assert {*body[bodies.FORM]["schema"]["properties"]} == {*fields}

    asyncio.run(main())


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@st.composite
def bodies_of_any_kind(draw):
    """(content type, body): garbage, bodies with some bytes changed, wrong fields."""
    field = st.sampled_from([*bodies.Form.model_fields, "x"])
    encoded = base64.b64encode(draw(st.sampled_from([GOOD, GOOD[:50], b""]))).decode()
    fields = {"image": encoded, "names": ["cow"]} | draw(
        st.dictionaries(field, json_values, max_size=3)
    )
    body, kind = json.dumps(fields).encode(), bodies.JSON
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["; boundary=b", "", "; boundary=", "; boundary=b; charset=x"]))
        kind = bodies.FORM + draw(st.just("; boundary=b") | st.just(kind))
        parts = [
            f'--b\r\ncontent-disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
            for key, value in fields.items()
            if key != "image"
        ]
        head = b'--b\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
        body = b"".join([*parts, head, GOOD, b"\r\n--b--\r\n"])
    changed = bytearray(body)
    for at, byte in draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)))):
        changed[at % len(changed)] = byte
    return kind, bytes(changed[: draw(st.just(len(changed)) | st.integers(0, len(changed)))])


def test_no_body_is_a_fault_of_the_server():
    app = make_app(Detector(Echo(), None), Limits(max_body=20_000, max_pixels=10_000))
    loop = asyncio.new_event_loop()
    context = client_of(app)
    client = loop.run_until_complete(context.__aenter__())

    @settings(
        max_examples=examples(60), suppress_health_check=[HealthCheck.too_slow], deadline=None
    )
    @given(bodies_of_any_kind())
    def send(request):
        kind, body = request
        answer = loop.run_until_complete(
            client.post("/detect", content=body, headers={"content-type": kind})
        )
        assert answer.status_code in (200, 400, 413, 415, 422), answer.text
        if answer.status_code != 200:
            [line] = answer.json().values()
            assert line and "\n" not in line and "object at 0x" not in line

    send()
    loop.run_until_complete(context.__aexit__(None, None, None))
    loop.close()


@asynccontextmanager
async def over_a_socket(app):
    """The server, and the address where it listens until it is told to stop."""
    with bound_socket("127.0.0.1", 0) as bound:
        url = address_of(bound.getsockname())
        server = Server(app, url)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        await until(lambda: server.started)
        yield server, serving, url
        app.state.gate.close()
        await asyncio.wait_for(serving, 10)
    with pytest.raises(OSError):
        bound.getsockname()


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_a_refusal_reaches_a_client_that_is_still_sending(connection):
    """Of any status, stated length or chunks, whether the connection is kept or not."""
    model = Echo()
    app = make_app(Detector(model, None), Limits(max_body=1_000_000, queue=1))
    part = bytes(1_000_000)

    async def main():
        async with over_a_socket(app) as (server, _, url):
            assert server.config.timeout_keep_alive > 60  # who closes first loses nothing

            async def send(kind, head, parts):
                reader, writer = await asyncio.open_connection("127.0.0.1", url.rsplit(":")[-1])
                writer.write(
                    f"POST /detect HTTP/1.1\r\nhost: a\r\nconnection: {connection}\r\n"
                    f"content-type: {kind}\r\n{head}\r\n\r\n".encode()
                )
                for bytes_ in parts:
                    writer.write(bytes_)
                    await writer.drain()
                status = await asyncio.wait_for(reader.readline(), 10)
                writer.close()
                return int(status.split()[1])

            stated = f"content-length: {len(part) * 8}", [part] * 8
            chunked = "transfer-encoding: chunked", [b"%x\r\n%b\r\n" % (len(part), part)] * 8
            chunked[1].append(b"0\r\n\r\n")
            for body in stated, chunked:
                assert await send("image/png", *body) == 415
                assert await send(bodies.JSON, *body) == 413
            with app.state.gate.entered():
                assert await send(bodies.JSON, *stated) == 429
            waits = "content-length: 8\r\nexpect: 100-continue"
            assert await send("image/png", waits, []) == 415

    asyncio.run(main())


def test_more_pixels_than_pillow_opens_can_be_allowed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    most, image = 500_000_000, head(20_000, 20_000)
    with pytest.raises(TooManyPixelsError):
        open_bytes(image, "a", most)
    make_app(Detector(Echo(), None), Limits(max_pixels=most))
    assert open_bytes(image, "a", most).width == 20_000


def test_told_to_stop_it_answers_what_it_accepted(capsys, monkeypatch):
    """Over a socket, with the signal; log handlers of the rest of the process stay open."""
    model, others = Echo(), logging.StreamHandler()
    monkeypatch.setattr(others, "close", lambda: pytest.fail("a handler was closed"))
    app = make_app(Detector(model, None), Limits(max_batch=2))

    async def main():
        async with (
            over_a_socket(app) as (_, serving, url),
            httpx.AsyncClient(base_url=url, timeout=20) as client,
        ):
            model.free.clear()
            ask = form(picture(), names="cow")
            waiting = [asyncio.create_task(client.post("/detect", **ask)) for _ in range(6)]
            await until(lambda: app.state.gate.inside == 6)
            with pytest.raises(httpx.ReadTimeout):  # who hangs up leaves the queue
                await client.post("/detect", **ask, timeout=0.2)
            await until(lambda: app.state.gate.inside == 6 and app.state.gate.accepted == 7)
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: app.state.gate.closed)
            late = await client.post("/detect", **ask)
            assert late.status_code == 503 and late.headers["retry-after"] == "1"
            health = await client.get("/health")
            assert health.status_code == 503 and health.json()["status"] == "stopping"
            assert (await client.get("/health/live")).status_code == 200
            assert not serving.done()
            model.free.set()
            assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 6
            await asyncio.wait_for(serving, 10)  # and the signal isn't raised again

    asyncio.run(main())
    assert "told to stop: answering 6 requests first" in capsys.readouterr().out


def test_decoded_images_share_a_budget(rng):
    """However many come: no more pixels at once than there are, in the order of coming."""

    async def main():
        budget, held, order = PixelBudget(100), [], []

        async def hold(number, pixels):
            async with budget.holding(pixels):
                order.append(number)
                held.append(pixels)
                assert sum(held) <= 100
                await asyncio.sleep(0)
                held.remove(pixels)

        tasks = [
            asyncio.create_task(hold(i, int(n))) for i, n in enumerate(rng.integers(1, 101, 60))
        ]
        tasks[7].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [i for i in range(60) if i != 7]

    asyncio.run(main())


def test_the_shipped_model_answers_as_it_does_alone(rng):
    """Batches of real detections, of one canvas: equal but for the last bits of float32."""
    detector = load_detector(device="cpu", pack="never")
    images = [rng.integers(0, 256, size, np.uint8) for size in ((90, 160, 3), (50, 40, 3))]
    prompts = [["red apple", "horse"], ["hammer", "sheep", "cow"]]
    alone = [detector(i, p, threshold=0) for i, p in zip(images, prompts, strict=True)]
    app = make_app(detector, Limits(max_batch=2, max_wait=0.5))

    async def main():
        requests = []
        for image, prompt in zip(images, prompts, strict=True):
            Image.fromarray(image).save(file := io.BytesIO(), "PNG")
            requests.append(form(file.getvalue(), names=prompt, threshold=0))
        async with client_of(app) as client:
            # longer than a position of the text encoder: refused or read, but never a fault
            long = await client.post("/detect", **form(GOOD, names="a b " * 120))
            assert long.status_code in (200, 422)
            answers = await asyncio.gather(*(client.post("/detect", **r) for r in requests))
            return [answer.json()["detections"] for answer in answers]

    for found, expected in zip(asyncio.run(main()), alone, strict=True):
        scores = [d["score"] for d in found]
        assert scores == pytest.approx(expected.scores.tolist(), abs=2e-4)
        boxes = {(d["phrase"], *np.round(d["box"])) for d in found}
        theirs = {(d["phrase"], *np.round(d["box"])) for d in detection_records(expected)}
        assert len(boxes & theirs) > 0.9 * len(boxes)


def test_the_command_says_why_it_cannot_start(monkeypatch, capsys):
    def error(*arguments) -> str:
        assert cli.main(arguments) == 2
        return capsys.readouterr().err

    assert "error: --queue 0 is less than 1" in error("--queue", "0")
    assert "--max-wait nan" in error("--max-wait", "nan")
    assert "--threshold 2 is not between 0 and 1" in error("--threshold", "2")
    assert "unknown model 'nono', did you mean" in error("--model", "nono", "--port", "0")
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"can't listen on 127.0.0.1:{port}" in error("--port", port)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert "fastapi is missing: pip install 'dynamic-dino[serve]'" in error()


def test_clients_learn_no_folder_of_the_server(tmp_path):
    (tmp_path / "run").mkdir()
    for model, shown in {
        "nano-dense": "nano-dense",
        "hf:IDEA-Research/grounding-dino-tiny": "hf:IDEA-Research/grounding-dino-tiny",
        f"hf:{tmp_path}/run": "run",
        f"{tmp_path}/run": "run",
        f"{tmp_path}/x.onnx": "x.onnx",
    }.items():
        assert public_name(Namespace(config_file=None, weights=None, model=model)) == shown
