"""The routers in plain torch, and the expert FFN as the simplest loop over experts.

They take what the entries of this package have checked: one dtype for x and the weights, no
autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate


def route(tokens: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, None]:
    """Summed in float64: equal rows of the weight then give equal float32 logits, whatever the
    order of summation that the matrix library chooses for a column."""
    logits = (tokens.double() @ weight.double().T).float()
    ids = best_first(logits)[:, :top_k]
    return ids.int(), logits.gather(1, ids).softmax(-1) * top_k, logits.softmax(-1), None


def route_any(
    tokens: Tensor, weight: Tensor, thresholds: Tensor, max_k: int, fallback: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    cosine = F.normalize(tokens.double()) @ F.normalize(weight.double()).T
    cosine, scores = cosine.detach().float(), cosine.float().sigmoid()
    chosen = cosine > thresholds
    if fallback:
        on = cosine.masked_fill(thresholds == torch.inf, -torch.inf)
        best = torch.zeros_like(chosen).scatter(1, best_first(on)[:, :1], 1)
        best = best & (thresholds < torch.inf)
        chosen = torch.where(chosen.any(1, keepdim=True), chosen, best)
    index = best_first(cosine.masked_fill(~chosen, -torch.inf))[:, :max_k]
    filled = chosen.gather(1, index)
    margin = (scores - thresholds.sigmoid()).gather(1, index)
    gates = (1 + margin - margin.detach()) / filled.sum(1, keepdim=True).clamp(min=1)
    ids = torch.where(filled, index, -1)
    return ids.int(), torch.where(filled, gates, 0.0).float(), scores, None


def best_first(values: Tensor) -> Tensor:
    """Indices by falling value. A stable sort breaks ties by the lowest index, which topk doesn't
    promise."""
    return torch.sort(values.detach(), dim=-1, descending=True, stable=True).indices


def add_and_norm(residual: Tensor, y: Tensor, norm: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """LayerNorm(residual + y) in the dtype of the norm's weight, see `expert_ffn`; without a norm,
    y as it is."""
    if norm is None:
        return y
    weight, bias, eps = norm
    return F.layer_norm((residual + y).to(weight.dtype), weight.shape, weight, bias, eps)


def sequential(x, w1, b1, w2, b2, expert_ids, gates, activation: str) -> Tensor:
    """Loops over all experts: select the expert's tokens, run them, add the result.

    The shortest code that is right. It waits for the device at every expert, for the number of its
    tokens, and is slower than the loop that Dynamic-DINO times (109 -> 98 FPS), which benchmarks
    have as well (`looped_ffn` in benchmarks/moe_peers.py).
    """
    gates = x.new_ones(expert_ids.shape) if gates is None else gates
    wide = torch.promote_types(torch.promote_types(x.dtype, gates.dtype), torch.float32)
    y = torch.zeros_like(x, dtype=wide)
    biases = ([None] * len(w1) if b is None else b.unbind() for b in (b1, b2))
    experts = zip(w1.unbind(), w2.unbind(), *biases, strict=True)
    for expert, (w1_e, w2_e, b1_e, b2_e) in enumerate(experts):
        token, slot = torch.where(expert_ids == expert)
        z = F.linear(x.index_select(0, token), w1_e, b1_e)
        y_e = F.linear(activate(z, activation), w2_e, b2_e)
        y = y.index_add(0, token, (gates[token, slot, None] * y_e).to(y.dtype))
    return y.to(x.dtype)
