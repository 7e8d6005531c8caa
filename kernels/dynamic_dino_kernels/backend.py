"""Which implementation of an operator runs: argument, then environment, then automatic."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "sequential", "grouped", "triton")
ENVIRONMENT_VARIABLE = "DYNAMIC_DINO_KERNELS"


@torch.compiler.assume_constant_result  # of a trace: it reads the environment, and logs
def resolve_backend(backend: str = "auto", device: torch.device | str = "cpu") -> str:
    """Returns "sequential", "grouped" or "triton", the back-end to run on tensors of a device.

    An explicit `backend` wins over the environment variable DYNAMIC_DINO_KERNELS, which wins over
    the automatic choice: "triton" on CUDA (from compute capability 8.0 on, and where Triton finds a
    C compiler and Python's headers), "grouped" elsewhere. What is chosen automatically is said once
    in the log, on CUDA with what keeps Triton from running.

    Raises:
        ValueError: the argument or the variable names no back-end.
        RuntimeError: "triton" was asked for where it can't run.
    """
    device = torch.device(device)
    name, source = backend, "backend"
    if name == "auto":
        name, source = os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "auto":
        return _automatic(device)
    if name == "triton" and (obstacle := obstacle_of(device)):
        raise RuntimeError(
            f"{source} is 'triton', but {obstacle}. Or choose 'grouped', or 'auto' to get the "
            "fastest that runs"
        )
    return name


@cache
def _automatic(device: torch.device) -> str:
    obstacle = "the tensors are on the CPU" if device.type == "cpu" else obstacle_of(device)
    name = "grouped" if obstacle else "triton"
    level = logging.WARNING if obstacle and device.type == "cuda" else logging.INFO
    because = f", since {obstacle}" if obstacle else ""
    logger.log(level, "Kernels on %s: %s%s", device, name, because)
    return name


def obstacle_of(device: torch.device) -> str:
    """Why Triton can't run there; "" if it can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"{device} has compute capability {major}.{minor}, and the kernels need 8.0"
        if not interpreted():
            return obstacle_to_launching(device)
    elif not interpreted():
        return f"the tensors are on {device}, not on CUDA"
    return ""


@cache
def obstacle_to_launching(device: torch.device) -> str:
    """Why Triton can't launch kernels there, and the remedy; "" if it can. Tried once a process."""
    from .probe import launch_nothing

    try:
        launch_nothing(device)
        return ""
    except CalledProcessError as error:
        reason = f"{error.cmd[0]} failed"
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"Triton can't launch a kernel there ({reason}): at run time it needs a C compiler and "
        "Python's headers (on Debian and Ubuntu: apt install gcc python3-dev), and a driver of the "
        "GPU as new as its CUDA"
    )


def interpreted() -> bool:
    """Whether Triton's interpreter was switched on, which runs the kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"
