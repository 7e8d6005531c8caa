"""Which implementation of an operator runs: argument, then environment, then automatic."""

from __future__ import annotations

import os

BACKENDS = ("auto", "sequential", "grouped", "triton")
ENVIRONMENT_VARIABLE = "DYNAMIC_DINO_KERNELS"


def resolve_backend(backend: str = "auto") -> str:
    """Returns "sequential" or "grouped", the back-end to run.

    An explicit `backend` wins over the environment variable DYNAMIC_DINO_KERNELS, which wins over
    the automatic choice, "grouped".

    Raises:
        ValueError: the argument or the variable names no back-end.
        RuntimeError: "triton" was asked for, and this version has no Triton kernels.
    """
    name, source = backend, "backend"
    if name == "auto":
        name, source = os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "triton":
        raise RuntimeError(
            f"{source} is 'triton', but this version of dynamic_dino_kernels has no Triton "
            "kernels: choose 'grouped', or 'auto' to get the fastest one there is"
        )
    return "grouped" if name == "auto" else name
