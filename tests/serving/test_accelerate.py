"""CUDA graphs on a pretended GPU: what is captured when, on which device and stream, and what not.

What real graphs return is tested in test_deploy.py, where there is a GPU.
"""

import logging
import re
import sys
import threading

import pytest
import torch
from dynamic_dino.serving.accelerate import CudaGraphs, WithFallback, accelerate, mode_of
from dynamic_dino_kernels.capture import waiting_forbidden
from dynamic_dino_kernels.timing import captured
from helpers.fake_cuda import FakeCuda


@pytest.fixture
def gpu(monkeypatch):
    """Tensors lie on cuda:1, while the current device is cuda:0."""
    fake = FakeCuda(monkeypatch, tensors=1)
    home = fake.current_stream("cuda:1")
    with fake.running():
        yield fake
    assert fake.device == 0 and fake.mode == 0, "the device and the mode are what they were"
    assert fake.current_stream("cuda:1") is home and fake.capturing is None


def affine(maps, scale=2.0):
    """Of tensors in a dict, and a constant."""
    y = (maps["x"] * scale + maps["y"]).relu()
    return {"y": y, "sum": [y.sum(-1)], "scale": scale}


def draw(*shape):
    return {"x": torch.randn(*shape), "y": torch.randn(*shape)}


def check(result, expected):
    torch.testing.assert_close(result["y"], expected["y"])
    torch.testing.assert_close(result["sum"][0], expected["sum"][0])
    assert result["scale"] == expected["scale"]


def waits(maps):
    """As the loop over experts does."""
    return maps["x"] * maps["y"].sum().item()


def test_graphs_follow_new_inputs_shapes_and_constants(gpu):
    graphs, results = CudaGraphs(affine), []
    for shape, scale in (((3, 4), 2.0), ((3, 4), 2.0), ((5, 4), 2.0), ((3, 4), 3.0), ((5, 4), 2.0)):
        maps = draw(*shape)
        results.append((graphs(maps, scale), affine(maps, scale)))
        assert graphs.ran == "graph"
    for result, expected in results:  # later replays have not changed earlier results
        check(result, expected)
    assert gpu.captures == 3 and not gpu.poisoned
    assert sorted(c.graph.replays for c in graphs._graphs.values()) == [1, 2, 2]


def test_what_waits_is_found_before_a_capture(gpu, caplog):
    run, maps = accelerate(waits, "graph"), draw(2, 3)
    for _ in range(2):
        torch.testing.assert_close(run(maps), maps["x"] * maps["y"].sum())
        assert mode_of(run) == "eager"
    assert gpu.captures == 0 and not gpu.poisoned
    (record,) = caplog.records
    why = r"waits runs without .*: line \d+ of test_accelerate.py waits for the GPU \(a CUDA graph"
    assert re.search(why, record.getMessage())
    for remedy in ("'grouped' and 'sequential'", "accelerate='eager'"):
        assert remedy in record.getMessage()


def test_a_capture_that_fails_all_the_same_leaves_the_stream(gpu, caplog):
    def fragile(x):
        if gpu.capturing:
            raise RuntimeError("out of luck")
        return x + 1

    run, x = accelerate(fragile, "graph"), torch.randn(3)
    home = gpu.current_stream("cuda:1")
    torch.testing.assert_close(run(x), x + 1)
    assert gpu.captures == 1 and gpu.current_stream("cuda:1") is home
    assert mode_of(run) == "eager" and len(caplog.records) == 1


def test_bad_arguments_are_an_error_and_no_reason_to_give_up(gpu, caplog):
    run = accelerate(affine, "graph")
    with pytest.raises(RuntimeError, match="must match"):
        run({"x": torch.randn(3), "y": torch.randn(4)})
    maps = draw(3)
    check(run(maps), affine(maps))
    assert mode_of(run) == "graph" and not caplog.records


def test_the_graph_that_was_used_least_recently_makes_place(gpu, caplog):
    graphs = CudaGraphs(affine, most=2)
    with caplog.at_level(logging.WARNING):
        for size in (1, 2, 1, 3, 1):
            maps = draw(size)
            check(graphs(maps), affine(maps))
    assert gpu.captures == 3 and len(caplog.records) == 1
    assert "more than 2 combinations of shapes" in caplog.text
    syncs = gpu.syncs
    check(graphs(maps := draw(2)), affine(maps))  # was dropped
    assert gpu.captures == 4 and gpu.syncs == syncs + 2  # before it was dropped, and to capture


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_may_change_between_calls(gpu, first, then):
    graphs = CudaGraphs(affine)
    for mode in (first, then):
        with mode():
            maps = draw(2, 3)
            result = graphs(maps)
            check(result, affine(maps))
            assert result["y"].is_inference() == (mode is torch.inference_mode)
    assert gpu.captures == 1


def test_the_function_itself_runs_for_gradients_and_in_the_capture_of_another(gpu):
    graphs, x = CudaGraphs(lambda x: x * 2), torch.randn(3, requires_grad=True)
    graphs(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0)) and graphs.ran == "eager"
    outer = CudaGraphs(lambda x: graphs(x) + 1)
    torch.testing.assert_close(outer(x.detach()), x.detach() * 2 + 1)
    assert outer.ran == "graph"


def test_threads_do_not_share_static_inputs(gpu):
    graphs, wrong = CudaGraphs(affine), []
    graphs(draw(2, 3))

    def serve():
        with gpu.running():
            for _ in range(30):
                maps = draw(2, 3)
                try:
                    check(graphs(maps), affine(maps))
                except Exception as error:
                    wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=serve) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and gpu.captures == 1


def test_another_stream_waits_until_the_last_one_has_its_results(gpu):
    graphs, maps = CudaGraphs(affine), draw(3)
    graphs(maps)
    first, other = gpu.current_stream("cuda:1"), torch.cuda.Stream("cuda:1")
    with gpu.stream(other):
        graphs(maps)
        graphs(maps)
    assert other.waited_for == [first]


def test_only_the_thread_that_waits_is_told_so(gpu):
    x, others = torch.ones(2), []

    def read():
        with gpu.running():
            others.append(torch.ones(2).sum().item())

    with waiting_forbidden():
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        assert others == [2.0]
        with pytest.raises(
            RuntimeError, match=r"^line \d+ of test_accelerate.py waits for the GPU"
        ):
            x.sum().item()
    assert gpu.mode == 0 and x.sum().item() == 2


def test_benchmarks_capture_with_the_same_care(gpu):
    with gpu.on_device("cuda:1"):
        x, y = torch.randn(3), torch.zeros(3)
        replay = captured(lambda: y.copy_(x * 2))
        x.copy_(torch.randn(3))
        replay()
        torch.testing.assert_close(y, x * 2)
        with pytest.raises(RuntimeError, match="waits for the GPU"):
            captured(lambda: x.sum().item())
    assert gpu.captures == 1 and not gpu.poisoned


def test_compiled_functions_say_so():
    run = WithFallback(lambda x: x, lambda x: x + 1, "compile")
    assert run(1) == 2 and mode_of(run) == "compile" and mode_of(abs) == "eager"
