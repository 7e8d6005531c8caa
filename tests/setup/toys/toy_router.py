"""A router of one's own."""

import torch
from dynamic_dino.moe.routers import Router
from dynamic_dino.moe.routing import Routing
from torch import Tensor, nn


class ToyRouter(Router):
    """The most probable expert of each token, a whole copy of the FFN with weight 1."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, 1
        self.weight = nn.Parameter(0.02 * torch.randn(num_experts, dim))

    def forward(self, tokens: Tensor, scene: Tensor | None = None) -> Routing:
        probs = (tokens.flatten(0, 1).float() @ self.weight.T).softmax(-1)
        return Routing(probs.argmax(1, keepdim=True).int(), None, probs)
