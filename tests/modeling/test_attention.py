"""Attention and position encodings against those of torch and of Grounding DINO."""

import pytest
import torch
from dynamic_dino.modeling.attention import (
    BiAttention,
    DeformableAttention,
    MultiHeadAttention,
    box_encoding,
    grid_encoding,
    sine_encoding,
)
from dynamic_dino.modeling.enhancer import block_positions, masked_mean, valid_ratio
from dynamic_dino.modeling.heads import BoxHead, ContrastiveHead
from dynamic_dino.modeling.query_selection import QuerySelection, grid_boxes
from dynamic_dino.modeling.structures import ImageMemory, TextFeatures
from torch import nn
from transformers import GroundingDinoConfig
from transformers.models.grounding_dino import modeling_grounding_dino as grounding_dino

LEVELS = [(6, 8), (3, 4), (2, 2)]


def content_mask(height: int, width: int, *sizes) -> torch.Tensor:
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    for row, (h, w) in zip(mask, sizes, strict=True):
        row[:h, :w] = True
    return mask


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def copy_linear(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


def memory(batch: int = 2, dim: int = 32) -> ImageMemory:
    """The second image is smaller than the canvas."""
    masks = [content_mask(h, w, (h, w), (-(-h // 2), -(-3 * w // 4))) for h, w in LEVELS]
    mask = torch.cat([m.flatten(1) for m in masks], 1)
    tokens = torch.randn(batch, mask.shape[1], dim)
    ratios = torch.stack([valid_ratio(m) for m in masks], 1)
    return ImageMemory(tokens, mask, LEVELS, ratios, tokens.mean(1))


# Position encodings ------------------------------------------------------------------------------
def test_grid_encoding():
    mask = content_mask(7, 5, (7, 5), (4, 3), (1, 1))
    theirs = grounding_dino.GroundingDinoSinePositionEmbedding(
        GroundingDinoConfig(d_model=32, positional_embedding_temperature=20)
    )(torch.empty(0), mask)
    ours = grid_encoding(mask, 32, temperature=20)
    torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2))
    assert grid_encoding(mask, 32).shape == (3, 35, 32)


def test_box_encoding():
    """DAB-DETR's formula, coordinate by coordinate: y, x, w, h."""
    boxes = torch.rand(2, 5, 4)
    encoding = box_encoding(boxes, 16).view(2, 5, 4, 16)
    for i, coordinate in enumerate((1, 0, 2, 3)):
        for channel in range(16):
            angle = boxes[..., coordinate] * 2 * torch.pi / 10000 ** (2 * (channel // 2) / 16)
            expected = angle.cos() if channel % 2 else angle.sin()
            torch.testing.assert_close(encoding[..., i, channel], expected)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_sine_encoding(width):
    positions = torch.rand(2, 9, width)
    theirs = grounding_dino.encode_sinusoidal_position_embedding(positions, num_pos_feats=64)
    torch.testing.assert_close(sine_encoding(positions, 64).shape, theirs.shape)
    # theirs: scaled by 2 pi; the first two coordinates change places
    ours = (positions * 2 * torch.pi)[..., [1, 0, 2, 3][:width] if width > 1 else [0]]
    torch.testing.assert_close(sine_encoding(ours, 64), theirs, atol=1e-5, rtol=0)


def test_block_positions():
    blocks = torch.tensor([[0, 1, 1, 1, 2, 3, 3, -1, -1], [0] * 9])
    assert block_positions(blocks).tolist() == [[0, 0, 1, 2, 0, 0, 1, 0, 1], list(range(9))]


def test_masked_mean():
    x, mask = torch.randn(2, 7, 3), torch.rand(2, 7) < 0.5
    mask[:, 0], mask[1, 1:] = True, False
    expected = torch.stack([row[m].mean(0) for row, m in zip(x, mask, strict=True)])
    torch.testing.assert_close(masked_mean(x, mask), expected)


# Attention ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("gradient", [True, False], ids=["training", "inference"])
def test_multi_head_attention(gradient):
    ours, theirs = MultiHeadAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    randomise(theirs)
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    for i, proj in enumerate(projections):
        proj.weight.data = theirs.in_proj_weight.data[32 * i : 32 * (i + 1)]
        proj.bias.data = theirs.in_proj_bias.data[32 * i : 32 * (i + 1)]
    copy_linear(theirs.out_proj, ours.out_proj)
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    mask = torch.rand(2, 5, 7) < 0.6
    mask[..., 0] = True
    with torch.set_grad_enabled(gradient):
        expected = theirs(q, k, v, attn_mask=~mask.repeat_interleave(4, 0))[0]
        torch.testing.assert_close(ours(q, k, v, mask), expected)
        torch.testing.assert_close(ours(q, k, v), theirs(q, k, v)[0])


def test_bi_attention():
    """The attention itself is Grounding DINO's; ours is added to the input, theirs to its norm."""
    config = GroundingDinoConfig(
        d_model=32, encoder_ffn_dim=96, encoder_attention_heads=8, fusion_dropout=0.0
    )
    ours = randomise(BiAttention(dim=32, embed_dim=48, heads=4, drop_path=0.5))
    theirs = grounding_dino.GroundingDinoBiMultiHeadAttention(config).eval()
    names = {
        "image_query": "vision_proj",
        "text_key": "text_proj",
        "image_value": "values_vision_proj",
        "text_value": "values_text_proj",
        "image_out": "out_vision_proj",
        "text_out": "out_text_proj",
    }
    for mine, other in names.items():
        copy_linear(getattr(ours, mine), getattr(theirs, other))
    image, text = torch.randn(2, 9, 32), torch.randn(2, 6, 32)
    image_mask, text_mask = torch.rand(2, 9) < 0.7, torch.rand(2, 6) < 0.7
    image_mask[:, 0] = text_mask[:, 0] = True
    with torch.no_grad():
        (to_image, _), (to_text, _) = theirs(
            ours.norm_image(image), ours.norm_text(text), ~image_mask, ~text_mask
        )
        new_image, new_text = ours(image, text, image_mask, text_mask)
    torch.testing.assert_close(new_image, image + ours.image_scale * to_image)
    torch.testing.assert_close(new_text, text + ours.text_scale * to_text)


def test_deformable_attention():
    config = GroundingDinoConfig(d_model=32, num_feature_levels=3, disable_custom_kernels=True)
    ours = DeformableAttention(32, heads=4, levels=3, points=2)
    theirs = grounding_dino.GroundingDinoMultiscaleDeformableAttention(config, 4, 2)
    randomise(theirs)
    for name in ("sampling_offsets", "attention_weights", "value_proj"):
        copy_linear(getattr(theirs, name), getattr(ours, name))
    copy_linear(theirs.output_proj, ours.out_proj)
    image, query = memory(), torch.randn(2, 5, 32)
    boxes = torch.rand(2, 5, 4) * 0.5 + 0.2
    shapes = torch.tensor(LEVELS)
    reference = boxes[:, :, None] * torch.cat([image.valid_ratios] * 2, -1)[:, None]
    expected, _ = theirs(
        query,
        attention_mask=image.mask,
        encoder_hidden_states=image.tokens,
        reference_points=reference,
        spatial_shapes=shapes,
        spatial_shapes_list=LEVELS,
        level_start_index=None,
    )
    result = ours(query, boxes, image.tokens, image.mask, LEVELS, image.valid_ratios)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_deformable_attention_starts_as_a_star():
    attention = DeformableAttention(32, heads=8, levels=3, points=4)
    attention.reset_parameters()
    offsets = attention.sampling_offsets(torch.randn(32)).view(8, 3, 4, 2)
    assert (offsets == offsets[:, :1]).all()
    lengths = offsets.abs().amax(-1)
    torch.testing.assert_close(lengths, torch.arange(1.0, 5).expand(8, 3, 4))
    assert len(offsets[:, 0, 0].sign().unique(dim=0)) >= 4


# Query selection and heads -----------------------------------------------------------------------
def test_grid_boxes():
    """Against Grounding DINO's proposals, which are logits, infinite where not usable."""
    image = memory()
    config = GroundingDinoConfig(d_model=32)
    holder = nn.Module()
    holder.enc_output, holder.enc_output_norm, holder.config = nn.Identity(), nn.Identity(), config
    _, proposals = grounding_dino.GroundingDinoModel.generate_encoder_output_proposals(
        holder, image.tokens, ~image.mask, LEVELS
    )
    boxes, usable = grid_boxes(image, base_size=0.05)
    assert torch.equal(usable, proposals.isfinite().all(-1)) and 0 < usable.sum() < usable.numel()
    torch.testing.assert_close(boxes[usable], proposals[usable].sigmoid())
    assert (boxes > 0).all() and (boxes < 1).all()


def test_query_selection():
    image = memory()
    text_mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    text = TextFeatures(
        torch.randn(2, 6, 32), text_mask, torch.zeros(2, 6).long(), torch.zeros(2, 1, 6)
    )
    boxes, usable = grid_boxes(image, 0.05)
    wanted = int(usable.sum(1).min())  # all that the smaller image has
    selection = randomise(QuerySelection(32, wanted, ContrastiveHead(32)))
    queries, predictions = selection(image, text)
    tokens = selection.norm(selection.proj(image.tokens))
    logits = tokens @ text.tokens.transpose(1, 2) / 32**0.5 + selection.class_head.bias
    for i in range(2):
        real = text_mask[i]
        score = logits[i][:, real].amax(-1).masked_fill(~usable[i], -torch.inf)
        best = score.sort(descending=True).indices[:wanted]
        torch.testing.assert_close(predictions.logits[i][:, real], logits[i][best][:, real])
        assert predictions.logits[i][:, ~real].isneginf().all()
        refined = selection.box_head(tokens[i][best], boxes[i][best])
        torch.testing.assert_close(queries.boxes[i], refined)
        torch.testing.assert_close(predictions.boxes[i], refined)
    assert not queries.boxes.requires_grad and predictions.boxes.requires_grad
    assert torch.equal(queries.content[0], selection.content.weight)
    # more queries than tokens: as many as there are
    selection = QuerySelection(32, 1000, ContrastiveHead(32))
    assert selection(image, text)[0].content.shape == (2, 64, 32)


def test_boxes_start_as_their_references():
    head, reference = BoxHead(16), torch.rand(2, 7, 4).clamp(1e-4, 1 - 1e-4)
    torch.testing.assert_close(head(torch.randn(2, 7, 16), reference), reference)
    randomise(head)
    edge = torch.tensor([0.0, 1.0, 0.5, 1e-9])
    assert head(torch.randn(16), edge).isfinite().all()


def test_prior_probability():
    """Without any evidence a token is positive with probability 0.01."""
    logits = ContrastiveHead(16)(torch.zeros(1, 2, 16), torch.randn(1, 3, 16), torch.ones(1, 3) > 0)
    torch.testing.assert_close(logits.sigmoid(), torch.full((1, 2, 3), 0.01), atol=1e-4, rtol=0)
    assert ContrastiveHead(16, scaled=False).bias is None
