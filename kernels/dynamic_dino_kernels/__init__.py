"""Operators of Dynamic-DINO: router and expert FFN of a mixture of experts; deformable attention.

Each operator is one function with argument checks and a choice of back-ends behind it:

    from dynamic_dino_kernels.moe import expert_ffn, moe_block, route, route_any
    from dynamic_dino_kernels.deform_attn import ms_deform_attn
"""

from .backend import BACKENDS, resolve_backend
from .deform_attn import ms_deform_attn
from .moe import expert_ffn, moe_block, route, route_any, warmup

__version__ = "0.1.0"  # of dynamic_dino too; setup.py reads it here
__all__ = [
    "BACKENDS",
    "expert_ffn",
    "moe_block",
    "ms_deform_attn",
    "resolve_backend",
    "route",
    "route_any",
    "warmup",
]
