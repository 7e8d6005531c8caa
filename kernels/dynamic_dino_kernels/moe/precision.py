"""How the matrix products of the expert FFN round float32: PyTorch's setting, and the GPU, decide.

    ieee     float32 throughout, on the ordinary units
    tf32     factors rounded to TF32, 11 significant bits, on the matrix units
    tf32x3   three TF32 products on the matrix units, which lose next to nothing

tf32x3 splits each factor into its TF32 value and the rest, a = a1 + a2 with |a2| <= 2^-11 |a|, and
sums a1 b2 + a2 b1 + a1 b1 in float32, the small ones first. What is left out, a2 b2, is at most
2^-22 |a b|; the rests have up to 13 bits, of which the units use 11, so each small product may
lose another 2^-21 |a b|. A product is hence off by at most 5 * 2^-22 of its size (1.2e-6), in the
mean by far less; for comparison, float32 rounds each product to 2^-24, and the partial sums of
1024 terms err by about 2^-19 whatever the products are. The method is CUTLASS's "3xTF32" (its
example 27), analysed by Ootomo and Yokota (arXiv 2203.03341); in Triton's own comparison of both
with a float64 product (pull request 4934) its error is no larger than CUTLASS's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import GPU, gpu_of

# Where three TF32 products take less than half the time of one in float32: peak TFLOPS of the data
# sheets are 156 / 3 to 19.5 (A100), 495 / 3 to 67 (H100), 1100 / 3 to 75 (B200). GeForce and RTX
# GPUs have 1:1 or 2:1 instead of 8:1, and lose by it.
THREE_PRODUCTS = ("sm_80", "sm_90", "sm_100")


def precision_of(x: Tensor, backward: bool = False) -> str:
    """`tl.dot`'s input_precision for products with x: for float32 what PyTorch is set to ("tf32" or
    "ieee"); where it isn't set, "tf32x3" if that is faster, else "ieee". Other types: "ieee".

    The backward kernel keeps its tokens in registers while it walks through the hidden units, and
    their six halves don't fit there: it computes in "ieee" where tf32x3 would be chosen.
    """
    return choose_precision(x.dtype, gpu_of(x.device), backward)


def choose_precision(dtype: torch.dtype, gpu: GPU, backward: bool = False) -> str:
    if dtype != torch.float32:
        return "ieee"
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # torch 2.9; once it is set, allow_tf32 can't be read
        asked = settings.fp32_precision
    else:
        asked = "tf32" if settings.allow_tf32 else "none"
    if asked in ("tf32", "ieee"):
        return asked
    return "tf32x3" if gpu.name in THREE_PRODUCTS and not backward else "ieee"
