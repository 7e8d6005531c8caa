"""Which implementation of an operator runs: argument, then environment, then automatic."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "sequential", "grouped", "triton")
ENVIRONMENT_VARIABLE = "DYNAMIC_DINO_KERNELS"


@torch.compiler.assume_constant_result  # of a trace: it reads the environment, and logs
def resolve_backend(backend: str = "auto", device: torch.device | str = "cpu") -> str:
    """Returns "sequential", "grouped" or "triton", the back-end to run on tensors of a device.

    An explicit `backend` wins over the environment variable DYNAMIC_DINO_KERNELS, which wins over
    the automatic choice: "triton" on CUDA (from compute capability 8.0 on), "grouped" elsewhere.
    What is chosen automatically is said once in the log.

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
            f"{source} is 'triton', but {obstacle}: choose 'grouped', or 'auto' to get the fastest "
            "that runs"
        )
    return name


@cache
def _automatic(device: torch.device) -> str:
    obstacle = "the tensors are on the CPU" if device.type == "cpu" else obstacle_of(device)
    name = "grouped" if obstacle else "triton"
    logger.info("Kernels on %s: %s%s", device, name, f", since {obstacle}" if obstacle else "")
    return name


def obstacle_of(device: torch.device) -> str:
    """Why Triton can't run there; "" if it can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"{device} has compute capability {major}.{minor}, and the kernels need 8.0"
    elif not interpreted():
        return f"the tensors are on {device}, not on CUDA"
    return ""


def interpreted() -> bool:
    """Whether Triton's interpreter was switched on, which runs the kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"
