"""Image backbones: any timm network with a feature pyramid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import Format
from torch import Tensor, nn

from ..sources import resolve
from .swin import accept_any_size


class Backbone(nn.Module):
    """A timm feature extractor that returns one map for each stride: P3, P4, P5 for 8, 16, 32.

    Args:
        name: timm model name, e.g. "efficientvit_l1.r224_in1k".
        weights: None for random, "timm" for timm's pretrained weights (Hugging Face hub),
            "package:MODULE/FILE" for a file inside an installed Python package, or a path.
        frozen: no gradients, batch norm in inference mode; then features can be cached on disk.
        freeze_norm: batch norms keep their weights and running statistics.
        frozen_modules: modules of the timm model that get no gradients, e.g.
            ``["conv1", "layer1"]`` of a ResNet.
        strides: of the maps, powers of two from fine to coarse.
        out_norm: a layer norm on each map, as detectors put on Swin's.
        options: of the timm model, e.g. ``{"strict_img_size": False}``.

    Attributes:
        channels: of each map.
        pretrained: whether it brings its weights, so that checkpoints needn't.

    Raises:
        FileNotFoundError: the weights file or package is not there, or can't be fetched.
        ValueError: the network has no map of some stride, the weights don't fit it, or
            `frozen_modules` names none of its modules.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        frozen: bool = False,
        freeze_norm: bool = False,
        frozen_modules: Sequence[str] = (),
        grad_checkpointing: bool = False,
        strides: Sequence[int] = (8, 16, 32),
        out_norm: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        plain: dict[str, Any] = {  # timm wants tuples, not OmegaConf's lists
            key: tuple(value)
            if isinstance(value, Sequence) and not isinstance(value, str)
            else value
            for key, value in (options or {}).items()
        }
        try:
            body: Any = timm.create_model(
                name, features_only=True, pretrained=weights == "timm", **plain
            )
        except OSError as error:
            raise FileNotFoundError(
                f"weights of backbone {name!r} are not in the Hugging Face cache, and the hub "
                "can't be reached; download them where there is internet and set "
                f"model.backbone.weights=/path/to/them ({error})"
            ) from error
        self.body = body
        accept_any_size(self.body)
        info = self.body.feature_info
        if not set(strides) <= set(info.reduction()):
            wanted = ", ".join(map(str, strides))
            raise ValueError(f"backbone {name!r} has strides {info.reduction()}, needs {wanted}")
        self.strides = tuple(strides)
        self.levels = [info.reduction().index(s) for s in strides]
        self.channels = [info.channels()[i] for i in self.levels]
        self.out_norm = nn.ModuleList(nn.LayerNorm(c) for c in self.channels if out_norm)
        self.frozen, self.freeze_norm, self.pretrained = frozen, freeze_norm, weights is not None
        if weights not in (None, "timm"):
            self._load(name, weights)
        if grad_checkpointing:
            self.body.set_grad_checkpointing(True)
        if frozen:
            self.requires_grad_(False)
        for norm in self._batch_norms() if freeze_norm else ():
            norm.requires_grad_(False)
        for prefix in frozen_modules:
            self._freeze(name, prefix)
        # Convolutions run two to three times faster, and 1x1 ones become plain matmuls.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stub

    def _batch_norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def _freeze(self, name: str, prefix: str) -> None:
        parameters = [p for n, p in self.body.named_parameters() if n.startswith(f"{prefix}.")]
        if not parameters:
            names = ", ".join(n for n, _ in self.body.named_children())
            raise ValueError(f"frozen_modules: backbone {name!r} has no {prefix!r}, only {names}")
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _load(self, name: str, weights: str) -> None:
        try:
            state = torch.load(resolve(weights), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch's and pickle's are of many types
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"backbone weights {weights!r} can't be read ({reason}): the file is damaged or "
                "holds more than weights; fetch it again"
            ) from error
        target = self.body.state_dict()
        names = [key for key in target if not key.endswith("num_batches_tracked")]
        if all(key in state for key in names):
            known = {key: state[key] for key in names}
        else:
            # timm renames modules; both orders follow the network, so shapes settle it.
            known = match_by_order(state, target, weights)
        try:
            self.body.load_state_dict(target | known)
        except RuntimeError as error:
            raise ValueError(f"weights {weights!r} don't fit backbone {name!r}: {error}") from error

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode and not self.frozen)
        if self.freeze_norm:
            for norm in self._batch_norms():
                norm.eval()
        return self

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, H, W], normalised -> {"p3", "p4", "p5"}: [B, C, H / s, W / s]"""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.body(images.contiguous(memory_format=torch.channels_last))
            maps = [maps[i] for i in self.levels]
            if getattr(self.body, "output_fmt", None) == Format.NHWC:
                maps = [x.permute(0, 3, 1, 2) for x in maps]
            for i, norm in enumerate(self.out_norm):
                maps[i] = norm(maps[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        names = [f"p{stride.bit_length() - 1}" for stride in self.strides]
        return dict(zip(names, maps, strict=True))


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
