"""The load test tells equal answers, last digits and wrong ones apart, and counts requests."""

import asyncio
import copy
import time

import httpx
import pytest
import serve_load
from lib import tables


def detection(phrase="cow", score=0.8, box=(1.0, 2.0, 30.0, 40.0)) -> dict:
    return {"phrase": phrase, "score": score, "box": list(box)}


EXPECTED = {
    "width": 64,
    "height": 48,
    "prompt": ["cow", "horse"],
    "detections": [detection(), detection("horse", 0.5), detection(score=0.3005, box=(5, 5, 9, 9))],
}


def counted(change) -> dict:
    answer, tally = copy.deepcopy(EXPECTED), serve_load.Tally()
    change(answer, answer["detections"])
    serve_load.compare(answer, serve_load.Asked(b"", "", EXPECTED, 0.3), tally)
    return dict(tally.count)


def test_answers_are_told_apart():
    assert counted(lambda answer, found: None) == {"equal": 1}
    assert counted(lambda answer, found: found[0].update(score=0.8001)) == {"close": 1}
    assert counted(lambda answer, found: found[1]["box"].__setitem__(0, 1.1)) == {"close": 1}
    assert counted(lambda answer, found: found.pop()) == {"close": 1}  # it was at the threshold
    assert counted(lambda answer, found: found.pop(0)) == {"wrong": 1}
    assert counted(lambda answer, found: found[0].update(score=0.81)) == {"wrong": 1}
    assert counted(lambda answer, found: found[0].update(phrase="horse")) == {"wrong": 1}
    assert counted(lambda answer, found: found.append(detection("horse", 0.6))) == {"wrong": 1}
    assert counted(lambda answer, found: answer.update(width=65)) == {"wrong": 1}


@pytest.mark.parametrize(
    ("error", "begun", "counted_as"),
    [
        (httpx.ConnectError, "before", "not_connected"),  # nothing was sent
        (httpx.ReadError, "before", "lost"),
        (httpx.ReadError, "after", "not_connected"),
        (httpx.ConnectError, "much before", "lost"),
    ],
)
def test_what_was_sent_before_the_signal_is_lost_without_an_answer(error, begun, counted_as):
    tally = serve_load.Tally()
    now = time.perf_counter()
    tally.told = {"before": now + 0.02, "after": now - 1, "much before": now + 60}[begun]

    class Client:
        async def post(self, *_, **__):
            await asyncio.sleep(0.05)
            raise error("no")

    asked = [serve_load.Asked(b"", "", EXPECTED, 0.3)]
    asyncio.run(serve_load.client_of(Client(), asked, tally, now + 0.04, 0))
    assert dict(tally.count) == {counted_as: 1}


def test_a_request_too_few_is_a_fault():
    run = {key: 0 for key in serve_load.COUNTS} | {"equal": 7, "refused": 2, "accepted": 9}
    run |= {"exit_status": 0, "seconds": 60.0, "clients": 3, "seconds_p50_p95_p99": [0.1, 1, 2.5]}
    run["memory_mb"] = [700.0] + 9 * [800.0] + 10 * [790.0]
    assert not serve_load.faults(run)
    assert "| 800 / 800 / 790 |" in tables.serve_load({"runs": {"soak": run}})
    found = serve_load.faults(run | {"accepted": 10, "lost": 1, "exit_status": 143})
    assert len(found) == 3 and "accepted 10 requests, clients have 9" in found[1]
