"""timm's Swin Transformer on images of any size, as detectors use it (arXiv 2103.14030)."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn


class PaddedBlock(SwinTransformerBlock):
    """Fills the map up to whole windows and shifts it then, as the original code for detection.

    timm shifts first, which gives other windows where the map is no multiple of them. The zeros
    that fill it up are attended to, in both.
    """

    def _attn(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        height, width, channels = x.shape[1:]
        window, shift = tuple(self.window_size), tuple(self.shift_size)
        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        padded, mask = x.shape[1:3], None
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
            inference = torch.is_inference_mode_enabled()
            mask = shift_mask(*padded, window, shift, x.device, x.dtype, inference)
        windows = self.attn(window_partition(x, window).flatten(1, 2), mask)
        x = window_reverse(windows.view(-1, *window, channels), window, *padded)
        if any(shift):
            x = x.roll(shift, (1, 2))
        return x[:, :height, :width]


def accept_any_size(model: nn.Module) -> None:
    """Makes `PaddedBlock`s of the blocks of timm's Swin, and fills up its last patches; other
    networks stay as they are."""
    swin = any(isinstance(module, SwinTransformerBlock) for module in model.modules())
    for module in model.modules():
        if swin and isinstance(module, PatchEmbed):
            module.dynamic_img_pad = True
        if type(module) is SwinTransformerBlock:
            module.__class__ = PaddedBlock  # the weights, and their names, are the same
            module.attn.fused_attn = True


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
    """Parts the cells that only the cyclic shift brought into one window: 0 or -100, in one window
    of N cells after the other [windows, N, N].

    Made once for each size, and not to be written to. `inference` keeps tensors of inference mode,
    which autograd refuses, apart from others.
    """

    def parts(size: int, window: int, shift: int) -> Tensor:
        index = torch.arange(size, device=device)
        return (index >= size - window).long() + (index >= size - shift)

    rows, columns = (parts(*sizes) for sizes in zip((height, width), window, shift, strict=True))
    region = 3 * rows[:, None] + columns
    region = window_partition(region[None, :, :, None], window).flatten(1)
    apart = region[:, :, None] != region[:, None]
    return torch.zeros(apart.shape, device=device, dtype=dtype).masked_fill_(apart, -100.0)
