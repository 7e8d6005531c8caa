"""Random arguments of `expert_ffn`, as tests of all its back-ends need them."""

import torch
from torch import Tensor


def random_arguments(
    tokens, slots, experts, dim, hidden, dtype=torch.float64, rows=None
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors by name, without gradients, and ids, which are distinct in a row, as a top-k's are.

    rows: of each expert's W1, if not `hidden`."""
    rows = hidden if rows is None else rows
    shapes = {
        "x": (tokens, dim),
        "w1": (experts, rows, dim),
        "b1": (experts, rows),
        "w2": (experts, dim, hidden),
        "b2": (experts, dim),
        "gates": (tokens, slots),
    }
    args = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    args["w1"] /= dim**0.5
    args["w2"] /= hidden**0.5
    return args, torch.rand(tokens, experts).argsort(-1)[:, :slots].to(torch.int32)
