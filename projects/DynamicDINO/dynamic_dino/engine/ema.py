"""Exponential moving average of the trained weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ModelEma:
    """A second model whose weights follow the trained ones: w_ema <- d * w_ema + (1 - d) * w.

    Frozen parameters are shared with the model, not copied: a frozen text encoder costs nothing
    here or in the checkpoint. Buffers are copied. d rises as (1 + t) / (10 + t) to `decay`, so that
    the average forgets its random start quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"train.ema.decay must be in [0, 1), not {decay}")
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(model, shared).eval()
        self.source = model
        self.decay = decay
        self.updates = 0
        self._averaged = _trained(self.model)
        for parameter in self._averaged.values():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """Takes one step towards the model's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        present = _trained(self.source)
        averaged = [self._averaged[name] for name in present]
        get_ema_multi_avg_fn(decay)(averaged, list(present.values()), self.updates)
        self._copy_buffers()

    def state_dict(self) -> dict[str, Tensor | int]:
        """The averaged parameters by their names in the model; laid over the model's own state
        dict they give the averaged model."""
        return {"updates": self.updates, "weights": dict(self._averaged)}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError where the checkpoint's trained parameters are not this model's."""
        weights = state["weights"]
        if differing := sorted(weights.keys() ^ self._averaged.keys()):
            raise ValueError(
                f"the checkpoint's EMA does not fit: {len(differing)} parameters are trained in "
                f"only one of the two runs, e.g. {differing[0]}; resume with the same "
                "train.trainable and train.ema"
            )
        for name, parameter in self._averaged.items():
            parameter.copy_(weights[name])
        self.updates = state["updates"]
        self._copy_buffers()

    def _copy_buffers(self) -> None:
        for mine, theirs in zip(self.model.buffers(), self.source.buffers(), strict=True):
            mine.copy_(theirs)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
