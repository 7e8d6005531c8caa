"""The activations of an expert, plain and gated, as PyTorch defines them.

A gated one takes two values for each hidden unit and multiplies the activated half by the other
(Shazeer, arXiv 2002.05202). The gate's half comes first, as transformers stacks `gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}  # name -> of the gate
ACTIVATIONS = (*PLAIN, *GATED)


def activate(z: Tensor, activation: str) -> Tensor:
    """[..., H] -> [..., H]; of a gated activation [..., 2H] -> [..., H]."""
    if activation in PLAIN:
        return PLAIN[activation](z)
    gate, up = z.chunk(2, -1)
    return PLAIN[GATED[activation]](gate) * up
