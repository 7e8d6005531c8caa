"""Linear layers on weights that are packed once for oneDNN: inference in float32 on a CPU.

PyTorch passes a float32 `nn.Linear` to MKL, which on some processors doesn't use their widest
vectors; oneDNN does, and reads weights fastest in a layout of its own. Which of the two is faster
isn't for the maker's name to say: `gain` measures it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Activation -> oneDNN's name and algorithm for it, applied while the product is in the cache.
POST_OPS = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "silu": lambda x: F.silu(x, inplace=True),
}


class PackedWeight:
    """A weight [out, in] in oneDNN's layout, which takes the place of the weight itself: as large,
    read-only, and shared by threads. `dense` gives the weight back, bit for bit.

    Args:
        weight: float32 [out, in] on a CPU.
        rows: how many rows it will mostly be multiplied with: oneDNN chooses the layout by them.
            Any other number works as well.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.rows = rows
        with torch.no_grad():
            self.data = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), max(rows, 1))

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @torch.compiler.disable  # it can't be traced: the weight becomes a constant of the trace
    def dense(self) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError(
                "weights packed for oneDNN can't be traced by torch.jit: trace the model before it "
                "is packed (optimize_for_inference and load_detector: pack='never')"
            )
        with _disable_current_modes():
            return self.data.to_dense()

    def __reduce__(self):
        """For copies and pickles; the layout itself is nothing that could be copied."""
        return PackedWeight, (self.dense(), self.rows)


def obstacle(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Why weights of that device and dtype can't be packed; "" if they can."""
    if torch.device(device).type != "cpu":
        return f"the weights are on {device}, not on a CPU"
    if dtype != torch.float32:
        return f"the weights are {str(dtype).removeprefix('torch.')}, not float32"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return "this PyTorch's oneDNN doesn't pack weights"
    return ""


def applies(*inputs: Tensor) -> bool:
    """Whether packed weights may be multiplied with these: not where a gradient or the autocast
    dtype is asked for, or a trace made, or something was cast or moved."""
    return (
        all(x.is_cpu and x.dtype == torch.float32 for x in inputs)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def packed_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """act(x W^T + b) of x [..., in]: one call of oneDNN where packed weights apply, else plain.

    activation: "none", "relu", "gelu" (exact), "gelu_tanh" or "silu".
    """
    if applies(x):
        return multiply(x, weight, bias, activation)
    y = F.linear(x, weight.dense(), bias)
    return y if activation == "none" else _ACTIVATIONS[activation](y)


def multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """`packed_linear` of inputs to which packed weights apply."""
    name, algorithm = POST_OPS[activation]
    # What torch.compile makes of a linear layer; there is no public name for it.
    return torch.ops.mkldnn._linear_pointwise(x, weight.data, bias, name, [], algorithm)


def gain(rows: int, inputs: int, outputs: int, activation: str = "none") -> float:
    """How many times as fast as a plain linear layer a packed one is, on this machine.

    Both take turns for some tens of milliseconds, then the fastest call of each is compared: what
    else the machine does can only slow calls down. Measured once in a process for a number of
    threads.
    """
    return _gain(rows, inputs, outputs, activation, torch.get_num_threads())


@cache
def _gain(rows: int, inputs: int, outputs: int, activation: str, threads: int) -> float:
    with torch.inference_mode():
        x, weight = torch.ones(rows, inputs), torch.ones(outputs, inputs)  # leaves seeds alone
        packed, bias = PackedWeight(weight, rows), torch.ones(outputs)
        ways = (
            lambda: _ACTIVATIONS[activation](F.linear(x, weight, bias)),
            lambda: multiply(x, packed, bias, activation),
        )
        best = [float("inf"), float("inf")]
        end, rounds = time.perf_counter() + 0.04, 0
        while rounds < 5 or (time.perf_counter() < end and rounds < 200):
            for i, way in enumerate(ways):
                start = time.perf_counter()
                way()
                if rounds:  # the first warms up
                    best[i] = min(best[i], time.perf_counter() - start)
            rounds += 1
    return best[0] / best[1]
