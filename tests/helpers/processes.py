"""Processes by fork of one that has imported PyTorch, for which a new one takes seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

INTERPRETER = "TRITON_INTERPRET"
IMPORTED = ["dynamic_dino_kernels.moe.ops", "dynamic_dino_kernels.deform_attn.ops"]


def run_python(*command: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """What ``python COMMAND...`` does: a file, or ``-c CODE``, with arguments.

    It is a fork of a server that has imported PyTorch and Triton alone, without the latter's
    interpreter: in the tests' own process that has replaced the kernels for good.

    env: its environment, by default this one's, but for the interpreter's switch.
    """
    command = [str(part) for part in command]
    environment = {k: v for k, v in (env or os.environ).items() if k != INTERPRETER}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.delenv(INTERPRETER, raising=False)  # the server keeps the environment of its start
        process = context.Process(target=_run, args=(command, environment, folder))
        process.start()
        process.join()
        output = [Path(folder, name).read_text() for name in ("out", "err")]
    return subprocess.CompletedProcess(command, process.exitcode, *output)


def _run(command: list[str], environment: dict[str, str], folder: str) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        _run_file(*command)


def _run_file(*command: str) -> None:
    sys.argv = [*command]
    runpy.run_path(command[0], run_name="__main__")


# CUDA can't be used in a fork, nor gradients where there is a GPU.
FORK = "spawn" if torch.cuda.is_available() else "fork"


def way_to_start() -> str:
    """A fork, unless it couldn't compute gradients: not after this process has done so for a device
    with threads of its own, as a pretended one has (PyTorch's wiki, Autograd-and-Fork)."""
    if FORK == "fork":
        trial = multiprocessing.get_context("fork").Process(target=_try_gradients)
        trial.start()
        trial.join()
        return "spawn" if trial.exitcode else "fork"
    return FORK


def _try_gradients() -> None:
    try:
        torch.ones(1, requires_grad=True).sum().backward()
    except RuntimeError:
        os._exit(1)
    os._exit(0)


def start_file(*command: object) -> multiprocessing.Process:
    """``python FILE ARGUMENTS...``, under way; it has all that this process has imported, if it can
    be forked."""
    context = multiprocessing.get_context(way_to_start())
    process = context.Process(target=_run_file, args=[str(part) for part in command])
    process.start()
    return process
