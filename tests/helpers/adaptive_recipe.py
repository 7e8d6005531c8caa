"""The tiny recipe with a top-any layer whose experts come and go: one of four that start has a
threshold that no token reaches, and the others have thresholds that some tokens don't."""

import torch
from detectron2.config import LazyCall as L
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.top_any import TopAnyRouter

from .tiny_recipe import (  # noqa: F401
    TinyModel,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)


class AdaptiveModel(TinyModel):
    def __init__(self, dim: int, **options) -> None:
        super().__init__(dim, **options)
        self.mixture = MoEFeedForward(dim, 6, router=TopAnyRouter(dim, 6, initial_experts=4))
        with torch.no_grad():
            thresholds = torch.tensor([0.3, 0.35, 3.0, 0.4, 0.0, 0.0])
            self.mixture.router.thresholds.copy_(thresholds)

    def forward(self, batch: list[dict]):
        routings = []

        def hidden(module, inputs, output):
            y, routing = self.mixture(output[:, None])
            routings.append(routing)
            return output + y[:, 0]

        handle = self.body.register_forward_hook(hidden)
        outputs = super().forward(batch)
        handle.remove()
        if not self.training:
            return outputs
        used = routings[0].expert_ids >= 0
        return {
            **outputs,
            "moe/experts": routings[0].active.float().sum(),
            "moe/unrouted": (~used).all(1).float().mean(),
            "routings": routings,
        }


model._target_ = L(AdaptiveModel)()._target_
train["adaptive_experts"] = dict(enabled=True, period=6, window=4)
