"""The smallest kernel. Launching it builds all that Triton builds at run time."""

from __future__ import annotations

import torch
import triton


@triton.jit
def nothing(n):
    pass


def launch_nothing(device: torch.device) -> None:
    """Compiles Triton's driver and a launcher, in C, and a kernel, all kept in Triton's cache.

    Raises whatever goes wrong: there is no C compiler or no Python.h, the GPU's driver is too old.
    """
    with torch.cuda.device(device):
        nothing[(1,)](2)
