"""Casts to the autocast dtype: once for a parameter that nobody trains, not at every call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


class _Cast(NamedTuple):
    version: int
    address: int
    copy: Tensor


_casts = WeakTensorKeyDictionary()  # parameter -> _Cast, dropped with the parameter


def cast_weight(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in the given dtype, except float64, which autocast leaves alone.

    A parameter's copy is kept where no gradient can flow to it, and made anew when the parameter
    has been written to. (Writing through ``.data`` goes unnoticed, as it does by autograd.)
    """
    if tensor.dtype in (dtype, torch.float64):
        return tensor
    if not _may_keep(tensor):
        return tensor.to(dtype)
    now = (tensor._version, tensor.data_ptr())
    kept = _casts.get(tensor)
    if kept is None or kept[:2] != now or kept.copy.dtype != dtype:
        kept = _Cast(*now, tensor.detach().to(dtype))
        _casts[tensor] = kept
    return kept.copy


def _may_keep(tensor: Tensor) -> bool:
    return (
        isinstance(tensor, nn.Parameter)
        and not (torch.is_grad_enabled() and tensor.requires_grad)
        and not tensor.is_inference()
        and not torch.compiler.is_compiling()
        # A graph that is captured writes its tensors when it is replayed, maybe never.
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
