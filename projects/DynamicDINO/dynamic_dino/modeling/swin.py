"""timm's Swin Transformer on images of any size, as detectors use it (arXiv 2103.14030)."""

from __future__ import annotations

from functools import lru_cache

import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformerBlock, window_partition
from torch import Tensor, nn


class PaddedBlock(SwinTransformerBlock):
    """Pads the map to whole windows and shifts it then, as the original code for detection does.

    timm shifts first, which gives other windows where the map is no multiple of them. Both attend
    to the zeros of the padding.
    """

    def _attn(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        batch, height, width, channels = x.shape
        geometry = (height, width, tuple(self.window_size), tuple(self.shift_size), x.device)
        inference = torch.is_inference_mode_enabled()
        places, cells = window_places(*geometry, inference)
        mask = shift_mask(*geometry, x.dtype, inference) if any(self.shift_size) else None
        windows = x.new_zeros(batch, cells, channels).index_copy_(1, places, x.flatten(1, 2))
        windows = self.attn(windows.view(-1, self.window_area, channels), mask)
        x = windows.reshape(batch, cells, channels).index_select(1, places)
        return x.view(batch, height, width, channels)


def accept_any_size(model: nn.Module) -> None:
    """Makes `PaddedBlock`s of the blocks of timm's Swin, and lets it pad images to whole patches;
    other networks stay as they are.

    timm builds the blocks itself and takes no class for them, so the class of the built ones is
    changed: their weights, and the names of these, are the same.
    """
    swin = any(isinstance(module, SwinTransformerBlock) for module in model.modules())
    for module in model.modules():
        if swin and isinstance(module, PatchEmbed):
            module.dynamic_img_pad = True  # type: ignore[misc]  # final in timm, see above
        if type(module) is SwinTransformerBlock:
            module.__class__ = PaddedBlock
            module.attn.fused_attn = True  # type: ignore[misc]  # likewise


@lru_cache(maxsize=16)
def window_places(
    height: int,
    width: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
    inference: bool,
) -> tuple[Tensor, int]:
    """int64 [height * width], the index of each cell of a map in the concatenation of all windows;
    and the number of cells that the windows have together.

    Cached for each combination of arguments, so it must not be written to. `inference`: whether
    torch.inference_mode is on; its tensors, which autograd refuses, are cached apart.
    """
    rows, columns = (-(-size // w) * w for size, w in zip((height, width), window, strict=True))
    cells = torch.arange(rows * columns, device=device).view(1, rows, columns, 1)
    shifted = cells.roll((-shift[0], -shift[1]), (1, 2))
    places = window_partition(shifted, window).flatten().argsort().view(rows, columns)
    return places[:height, :width].flatten(), rows * columns


@lru_cache(maxsize=8)
def shift_mask(
    height: int,
    width: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    inference: bool,
) -> Tensor:
    """The attention bias of each window of N cells, [windows, N, N]: -100 between cells that only
    the cyclic shift brought together, else 0. Cached as `window_places`."""

    def parts(size: int, window: int, shift: int) -> Tensor:
        size += -size % window
        index = torch.arange(size, device=device)
        return (index >= size - window).long() + (index >= size - shift)

    rows, columns = (parts(*sizes) for sizes in zip((height, width), window, shift, strict=True))
    region = 3 * rows[:, None] + columns
    region = window_partition(region[None, :, :, None], window).flatten(1)
    apart = region[:, :, None] != region[:, None]
    return torch.zeros(apart.shape, device=device, dtype=dtype).masked_fill_(apart, -100.0)
