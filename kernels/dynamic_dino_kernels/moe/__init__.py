"""Routers and expert FFN: every token passes through the few experts chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..backend import resolve_backend
from . import checks, reference
from .activations import ACTIVATIONS
from .casting import cast_weight
from .grouped import grouped_ffn

__all__ = ["ACTIVATIONS", "Routed", "expert_ffn", "moe_block", "route", "route_any", "warmup"]


class Routed(NamedTuple):
    """What a router says of T tokens, K slots and E experts.

    expert_ids  int32 [T, K], best first; -1 is an empty slot
    gates       float32 [T, K], 0 where the slot is empty; or None, where all are 1
    probs       float32 [T, E], what the router thinks of every expert
    blocks      for `expert_ffn`, which then needn't sort the same ids again: the slots of each
                block of tokens by expert. None from plain torch.
    """

    expert_ids: Tensor
    gates: Tensor | None
    probs: Tensor
    blocks: Tensor | None


def route(tokens: Tensor, weight: Tensor, top_k: int, *, backend: str = "auto") -> Routed:
    """p = softmax(W x), its k largest entries, and the softmax over those k, times k.

    Computed in float32 at least, outside autocast. Ties go to the lowest index, and experts with
    equal rows get equal logits, bit for bit: the siblings that MoE-Tuning makes win together.

    Args:
        tokens: float [T, D].
        weight: float [E, D], one row per expert.
        top_k: k, from 1 to E.
        backend: see `dynamic_dino_kernels.resolve_backend`; all but "triton" are plain torch.

    Returns:
        `Routed`: the k ids, gates that add up to k, and p. Gates and p are differentiable in tokens
        and weight.

    Raises:
        ValueError: shapes that don't fit, or k out of range; the message names them.
    """
    checks.check_router(tokens, weight, top_k, "top_k")
    implementation: Callable[..., tuple] = reference.route
    if resolve_backend(backend, tokens.device) == "triton":
        from .router import triton_route as implementation  # imports Triton
    with torch.autocast(tokens.device.type, enabled=False):
        return Routed(*implementation(tokens, weight, top_k))


def route_any(
    tokens: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    *,
    max_k: int | None = None,
    fallback: bool = False,
    backend: str = "auto",
) -> Routed:
    """Every expert whose score s = sigmoid(cos(x, w_e)) exceeds sigmoid(G_e): as many as may be.

    Top-any gating of DynMoE (arXiv 2405.14297, equations 3 to 6): the outputs of the chosen experts
    are averaged, so each of k gates is 1 / k. Their gradient goes straight through to s_e and to
    sigmoid(G_e), with a minus there; experts that weren't chosen get none from the gates.

    Args:
        tokens: float [T, D].
        weight: float [E, D], one row per expert.
        thresholds: float [E], G; infinity switches an expert off.
        max_k: slots of a token, K; of more experts the best are taken. None: E.
        fallback: a token that reaches no threshold gets its best expert, as in evaluation; else
            none, and all of its slots are empty.
        backend: see `dynamic_dino_kernels.resolve_backend`; all but "triton" are plain torch.

    Returns:
        `Routed`, with s as `probs`; differentiable in tokens, weight and thresholds.

    Raises:
        ValueError: shapes that don't fit, or `max_k` out of range; the message names them.
    """
    max_k = len(weight) if max_k is None else max_k
    checks.check_router(tokens, weight, max_k, "max_k")
    if thresholds.shape != weight.shape[:1]:
        raise ValueError(
            f"thresholds must be [E={len(weight)}], but its shape is {tuple(thresholds.shape)}"
        )
    implementation: Callable[..., tuple] = reference.route_any
    if resolve_backend(backend, tokens.device) == "triton":
        from .router import triton_route_any as implementation  # imports Triton
    with torch.autocast(tokens.device.type, enabled=False):
        return Routed(*implementation(tokens, weight, thresholds, max_k, fallback))


def expert_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    expert_ids: Tensor,
    gates: Tensor | None,
    *,
    activation: str = "relu",
    norm: tuple[Tensor, Tensor, float] | None = None,
    blocks: Tensor | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y[t] = sum_k gates[t, k] * (act(x[t] W1[e]^T + b1[e]) W2[e]^T + b2[e]), e = expert_ids[t, k].

    Gated activations take two halves, act(z) = act(z[:H]) * z[H:]: SwiGLU and GeGLU (Shazeer, arXiv
    2002.05202), the gate first, as transformers keeps `gate_up_proj`.

    Equation 4 of Dynamic-DINO (arXiv 2507.17436). Differentiable in x, the weights, the gates and
    the norm; experts without tokens get explicit zero gradients. Under autocast the matmuls run in
    the autocast dtype, as those of nn.Linear do, and where no gradient is asked for, a parameter is
    cast once for all calls until it changes.

    Args:
        x: float [T, D], T tokens.
        w1, b1, w2, b2: float [E, H, D], [E, H], [E, D, H], [E, D], E experts in the orientation of
            nn.Linear, of the dtype of x unless autocast is on. Of a gated activation, w1 [E, 2H, D]
            and b1 [E, 2H]. b1 and b2 may be None.
        expert_ids: int32 or int64 [T, K]; -1 is an empty slot, which contributes nothing.
        gates: float [T, K]; ignored where the slot is empty. None: 1 in every slot.
        activation: "relu", "gelu" (exact), "gelu_tanh" (its approximation) or "silu"; or, gated by
            the last three, "geglu", "geglu_tanh" (Gemma 4) or "swiglu" (Mixtral, Qwen).
        norm: weight [D], bias [D] and epsilon of a LayerNorm: the result is LayerNorm(x + y), the
            end of a post-norm transformer block. Triton does it in the pass that sums over k.
        blocks: what `route` or `route_any` returned beside exactly these ids.
        recompute: the backward pass computes the hidden layer, T * K * H values, once more instead
            of keeping it.
        backend: see `dynamic_dino_kernels.resolve_backend`.

    Returns:
        float [T, D] in the dtype of x, or the autocast dtype; with `norm`, in that of its weight.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it. Ids are checked
            against E on the CPU only: on CUDA that would stop the stream at every call. Set the
            environment variable DYNAMIC_DINO_KERNELS_DEBUG=1 to check them there as well.
    """
    name = resolve_backend(backend, x.device)
    call = None
    if name == "triton" and not (torch.compiler.is_compiling() or checks.debugging()):
        from .ops import find_ffn  # imports Triton

        call = find_ffn(x, w1, b1, w2, b2, expert_ids, gates, activation, blocks, norm)
        if call is not None and call.known:
            return call()
    checks.check_experts(x, w1, b1, w2, b2, activation, norm)
    checks.check_routing(x, w1, expert_ids, gates)

    device_type, residual = x.device.type, x
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, w1, w2 = (cast_weight(t, dtype) for t in (x, w1, w2))
        b1, b2 = (b if b is None else cast_weight(b, dtype) for b in (b1, b2))
    checks.check_one_dtype(x, w1, b1, w2, b2)
    if call is not None:
        return call()

    arguments = (x, w1, b1, w2, b2, expert_ids, gates, activation)
    with torch.autocast(device_type, enabled=False):
        if name == "triton":
            from .ops import Norm, triton_ffn

            return triton_ffn(*arguments, recompute, blocks, norm and Norm(residual, *norm))
        if name == "grouped":
            y = grouped_ffn(*arguments, recompute)
        elif recompute:
            y = checkpoint(reference.sequential, *arguments, use_reentrant=False)
        else:
            y = reference.sequential(*arguments)
        return reference.add_and_norm(residual, y, norm)


def moe_block(
    x: Tensor,
    router: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    top_k: int,
    weighted: bool = True,
    activation: str = "relu",
    norm: tuple[Tensor, Tensor, float] | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Routed]:
    """A whole FFN block of a transformer, from tokens to normed sum: `route`, then `expert_ffn`.

    The same result and gradients as those two; where no gradient is asked for, Triton's kernels
    are launched one after the other without the dispatch of either (see `replay`).

    Args:
        x: float [T, D], T tokens.
        router: float [E, D], one row per expert.
        top_k: k, experts per token.
        weighted: False: the experts' outputs are added as they are, gates are 1.
        w1, b1, w2, b2, activation, norm, recompute, backend: see `expert_ffn`.

    Returns:
        y [T, D], and what `route` says; its gates are None without `weighted`, its blocks are too
        where nothing is left to do with them.

    Raises:
        TypeError, ValueError: as those two.
    """
    name, call = resolve_backend(backend, x.device), None
    if name == "triton" and not torch.compiler.is_compiling():
        from .ops import find_block  # imports Triton

        call = find_block(x, router, w1, b1, w2, b2, top_k, weighted, activation, norm)
    if call is not None:
        if not call.known:
            checks.check_router(x, router, top_k, "top_k")
            checks.check_experts(x, w1, b1, w2, b2, activation, norm)
            checks.check_one_dtype(x, w1, b1, w2, b2)
        y, ids, gates, probs = call()
        return y, Routed(ids, gates, probs, None)
    ids, gates, probs, blocks = route(x, router, top_k, backend=name)
    routed = Routed(ids, gates if weighted else None, probs, blocks)
    y = expert_ffn(
        x, w1, b1, w2, b2, ids, routed.gates, activation=activation, norm=norm, blocks=blocks,
        recompute=recompute, backend=name,
    )  # fmt: skip
    return y, routed


def warmup(
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    top_k: int,
    tokens: Iterable[int],
    train: bool = False,
    **options: Any,
) -> None:
    """Compiles what `expert_ffn` will launch for these weights and numbers of tokens.

    Triton compiles a kernel when it first meets a new kind of argument, which takes seconds, and
    can't be done while a CUDA graph is captured. `options` are those of `expert_ffn`; with `train`
    the backward pass is run as well. Results and gradients are thrown away.
    """

    def leaf(weight: Tensor) -> Tensor:
        return weight.detach().requires_grad_(train)

    w1, w2 = leaf(w1), leaf(w2)
    b1, b2 = (b if b is None else leaf(b) for b in (b1, b2))
    for count in tokens:
        x = w1.new_zeros(count, w1.shape[2]).requires_grad_(train)
        ids = torch.arange(top_k, device=w1.device, dtype=torch.int32).expand(count, top_k)
        with torch.set_grad_enabled(train):
            y = expert_ffn(x, w1, b1, w2, b2, ids, w1.new_ones(count, top_k), **options)
        if train:
            torch.autograd.grad(y.sum(), [t for t in (x, w1, b1, w2, b2) if t is not None])
