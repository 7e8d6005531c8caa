"""`SceneRouter`: one choice of routes for an image, which all layers' routers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SceneRouter(nn.Module):
    """g = softmax(W_g scene / tau_s), once for an image (HI-MoE, arXiv 2604.04908, Algorithm 1,
    steps 2 to 4, and Figure 1). The detector gives g, in the scene's place, to the routers of its
    decoder, which have ``shared_scene=True``.

    Args:
        dim: width of the scene's features.
        num_routes: R, the paper's N_s.
        temperature: tau_s.
        std: standard deviation of the rows at the start.
    """

    def __init__(
        self, dim: int, num_routes: int = 4, temperature: float = 1.0, std: float = 0.02
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive")
        self.temperature, self.std = temperature, std
        self.weight = nn.Parameter(torch.empty(num_routes, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, 0, self.std)

    def forward(self, scene: Tensor) -> Tensor:
        """scene [B, D] -> g [B, R], in float32, outside autocast"""
        return route_probabilities(scene, self.weight, self.temperature)


def route_probabilities(scene: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """softmax(scene [B, D] weight [R, D]^T / temperature) -> [B, R]"""
    with torch.autocast(scene.device.type, enabled=False):
        return (scene.float() @ weight.float().T / temperature).softmax(-1)
