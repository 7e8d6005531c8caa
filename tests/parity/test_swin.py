"""timm's Swin, as the backbone uses it, against transformers' SwinBackbone."""

import pytest
import timm
import torch
from dynamic_dino.checkpoint.public import convert_weights, tidy
from dynamic_dino.modeling.backbone import Backbone
from transformers import SwinBackbone, SwinConfig

SIZES = dict(embed_dim=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4], window_size=4)
NAME, ANY_SIZE = "swin_tiny_patch4_window7_224", dict(strict_img_size=False, always_partition=True)


def swin_pair() -> tuple[Backbone, SwinBackbone]:
    theirs = SwinBackbone(SwinConfig(**SIZES, out_indices=[2, 3, 4])).eval()
    ours = Backbone(NAME, out_norm=True, options={**SIZES, **ANY_SIZE}).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    prefix = "model.backbone.conv_encoder.model."
    state, account = tidy({prefix + k: v for k, v in theirs.state_dict().items()}, "swin")
    shapes = {f"backbone.{k}": v for k, v in ours.state_dict().items()}
    state = convert_weights(state, shapes, "transformers", account, "swin")
    ours.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items()})
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 128), (97, 150), (33, 61), (5, 40)])
def test_any_size(size):
    """Of whole windows; with windows, patches and merged cells that are filled up; one cell."""
    ours, theirs = swin_pair()
    images = torch.randn(2, 3, *size)
    found, expected = ours(images), theirs(images).feature_maps
    assert ours.channels == [32, 64, 128] and list(found) == ["p3", "p4", "p5"]
    for x, y, stride in zip(found.values(), expected, (8, 16, 32), strict=True):
        assert x.shape[2:] == tuple(-(-edge // stride) for edge in size)
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_timm_alone_has_other_windows():
    """Where the map is no multiple of the window: the reason for `PaddedBlock`."""
    ours, _ = swin_pair()
    plain = timm.create_model(NAME, features_only=True, **SIZES, **ANY_SIZE).eval()
    plain.load_state_dict(ours.body.state_dict())
    ours.out_norm = torch.nn.ModuleList()
    for size, same in (((128, 128), True), ((96, 152), False)):
        images = torch.randn(1, 3, *size)
        first = plain(images)[1].permute(0, 3, 1, 2)
        assert torch.allclose(ours(images)["p3"], first, atol=1e-3) == same


def test_strides():
    backbone = Backbone(NAME, strides=(4, 16), options={**SIZES, **ANY_SIZE}).eval()
    features = backbone(torch.randn(1, 3, 40, 72))
    assert {k: tuple(x.shape) for k, x in features.items()} == {
        "p2": (1, 16, 10, 18),
        "p4": (1, 64, 3, 5),
    }
    features["p4"].sum().backward()
    assert all(b.attn.qkv.weight.grad.any() for b in backbone.body["layers_2"].blocks)
    with pytest.raises(ValueError, match=r"has strides \[4, 8, 16, 32\], needs 2, 8"):
        Backbone(NAME, strides=(2, 8))
