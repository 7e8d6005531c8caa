"""The MoE layers of a model, by names for people."""

from __future__ import annotations

import re

from torch import nn

from ..moe.layer import MoEFeedForward


def moe_layers(model: nn.Module) -> dict[str, MoEFeedForward]:
    """ "encoder 0", "decoder 2": its MoE layers in the order of their `Routing`s."""
    layers: dict[str, MoEFeedForward] = {}
    for path, module in model.named_modules():
        if isinstance(module, MoEFeedForward):
            part = "decoder" if path.startswith("decoder.") else "encoder"
            number = re.search(r"\d+", path)
            name = f"{part} {number[0]}" if number else path
            layers[path if name in layers else name] = module
    return layers
