"""Where Triton can't build what it launches, plain PyTorch runs, and the log says what to install.

No GPU is needed: what Triton builds at run time it builds before it looks for one.
"""

import logging
import os
import subprocess

import pytest
import torch
from dynamic_dino_kernels import backend, probe, resolve_backend
from helpers.processes import run_python

GPU = torch.device("cuda:0")
NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable"


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends a GPU on which the first launch ends like this; it returns the list
    of the launches that were tried."""

    def pretend(error: Exception | None = None, capability=(9, 0)) -> list:
        launches = []

        def launch(device) -> None:
            launches.append(device)
            if error is not None:
                raise error

        monkeypatch.setattr(probe, "launch_nothing", launch)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        return launches

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    yield pretend
    forget()


def forget():
    backend._automatic.cache_clear()
    backend.obstacle_to_launching.cache_clear()


def test_triton_runs_where_it_can_launch(gpu, caplog):
    launches = gpu()
    with caplog.at_level(logging.INFO):
        assert [resolve_backend(name, GPU) for name in ("auto", "triton", "auto")] == ["triton"] * 3
    assert launches == [GPU]
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "Kernels on cuda:0: triton")
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(f"{NO_COMPILER}\nor set a knob"), "(Failed to find C compiler. Please"),
        (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "x.c"]), "(/usr/bin/gcc failed)"),
        (AssertionError(), "(AssertionError)"),
    ],
)
def test_plain_torch_runs_where_it_cannot_and_the_log_says_what_to_install(
    gpu, caplog, error, reason
):
    launches = gpu(error)
    with caplog.at_level(logging.INFO):
        assert [resolve_backend("auto", GPU) for _ in range(3)] == ["grouped"] * 3
    assert launches == [GPU], "tried once"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "apt install gcc python3-dev" in record.getMessage()
    assert reason in record.getMessage() and "\n" not in record.getMessage()


def test_triton_that_was_asked_for_is_refused_with_the_remedy(gpu, monkeypatch):
    gpu(RuntimeError(NO_COMPILER))
    with pytest.raises(RuntimeError, match=r"^backend is 'triton', but .*apt install gcc python3"):
        resolve_backend("triton", GPU)
    monkeypatch.setenv("DYNAMIC_DINO_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="^DYNAMIC_DINO_KERNELS is 'triton', but .*C compiler"):
        resolve_backend("auto", GPU)


def test_nothing_is_launched_on_gpus_that_are_too_old(gpu):
    launches = gpu(capability=(7, 5))
    assert resolve_backend("auto", GPU) == "grouped" and not launches


REAL = """
import contextlib, torch
torch.cuda.is_available = lambda: True  # so that Triton believes in its CUDA driver
torch.cuda.device = lambda device: contextlib.nullcontext()
from dynamic_dino_kernels.backend import obstacle_to_launching
print(obstacle_to_launching(torch.device("cuda:0")))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton asks the real driver")
def test_what_triton_really_says_without_a_compiler(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "CC"}
    environment |= {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment["TRITON_LIBCUDA_PATH"] = str(tmp_path)  # else it looks for the driver first
    done = run_python("-c", REAL, env=environment)
    assert "(Failed to find C compiler." in done.stdout, done.stderr
