"""`expert_ffn` as an experts implementation of Hugging Face transformers (5.0 and later).

    from dynamic_dino_kernels.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="dynamic_dino")
    model.set_experts_implementation("dynamic_dino")  # or later

Every model whose experts are stacked, in nn.Linear's orientation, with the gate's half before the
other one, runs on it: Mixtral, Qwen, OLMoE, DeepSeek V2 and V3, Gemma 4 and most others. What
computes something else (GPT-OSS, DeepSeek V4, Aria, Nemotron-H) is refused with a ValueError when
it first runs. Only `register` imports transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .moe import expert_ffn

# What transformers calls an activation, by class or function -> what we do, alone and as a gate.
PLAIN = {
    F.relu: "relu",
    F.silu: "silu",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


def register(name: str = "dynamic_dino") -> None:
    """Makes transformers know `experts_implementation=name`. May be called again.

    The back-end is chosen as everywhere: Triton on CUDA, else plain PyTorch, or what the
    environment variable DYNAMIC_DINO_KERNELS says.

    Raises:
        ImportError: there is no transformers, or one without an interface for experts.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "expert_ffn can be registered with transformers 5.0 or later only: "
            "pip install 'transformers>=5'"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls as the forward of its experts.

    Args:
        self: the experts module, with what `use_experts_implementation` set on it.
        hidden_states: float [T, D].
        top_k_index: int [T, K]; with expert parallelism, E and more are other ranks' experts.
        top_k_weights: float [T, K].

    Returns:
        float [T, D].

    Raises:
        ValueError: these experts aren't what `expert_ffn` computes; the message says why not.
    """
    if reasons := list(_obstacles(self)):
        raise ValueError(
            f"{type(self).__name__} can't run on expert_ffn, since {', and '.join(reasons)}: "
            "choose another experts_implementation, such as 'grouped_mm' or 'eager'"
        )
    first = "gate_up_proj" if self.has_gate else "up_proj"
    w1, w2 = getattr(self, first), self.down_proj
    b1 = getattr(self, f"{first}_bias") if self.has_bias else None
    b2 = self.down_proj_bias if self.has_bias else None
    if self._is_expert_parallel:
        top_k_index = torch.where(top_k_index < len(w1), top_k_index, -1)
    activation = _activation(self)
    assert activation is not None  # `_obstacles` has found none
    return expert_ffn(
        hidden_states, w1, b1, w2, b2, top_k_index, top_k_weights, activation=activation
    )


def _activation(experts: Any) -> str | None:
    """Ours for the experts' act_fn; None if there is none."""
    act = getattr(experts, "act_fn", None)
    plain = PLAIN.get(type(act).__name__ if isinstance(act, nn.Module) else act)
    return GATED.get(plain) if plain is not None and experts.has_gate else plain


def _obstacles(experts: Any) -> Iterator[str]:
    """Why `expert_ffn` would compute something else."""
    if experts.is_transposed:
        yield "its weights are transposed, [E, D, 2H] and [E, H, D]"
    if experts.has_gate and not experts.is_concatenated:
        yield "its gate_up_proj interleaves gate and up"
    if experts.has_post_expert_norm:
        yield "it norms the output of every expert"
    if experts.has_gate and type(experts)._apply_gate.__name__ != "_default_apply_gate":
        yield "it gates in a way of its own (_apply_gate)"
    elif _activation(experts) is None:
        known = sorted(set(GATED if experts.has_gate else PLAIN.values()))
        yield f"its activation {getattr(experts, 'act_fn', None)} is none of {', '.join(known)}"
