"""Closed-set DINO's parts against transformers, with the same weights: neck and encoder against
Deformable DETR's, query selection and decoder against RT-DETR's. What DINO defines otherwise, the
position encodings, is put into theirs."""

import torch
import transformers
from dynamic_dino.modeling.attention import DeformableAttention, grid_encoding
from dynamic_dino.modeling.decoder import Decoder, DecoderLayer
from dynamic_dino.modeling.deformable_enhancer import DeformableEnhancer, DeformableImageLayer
from dynamic_dino.modeling.enhancer import EnhancerLayer
from dynamic_dino.modeling.feed_forward import FeedForward
from dynamic_dino.modeling.heads import LinearHead
from dynamic_dino.modeling.neck import GroupNormNeck
from dynamic_dino.modeling.preprocess import content_mask
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.modeling.query_selection import QuerySelection
from dynamic_dino.modeling.structures import ImageMemory
from dynamic_dino.modeling.vocabulary import ClassVocabulary
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

DIM, HEADS, HIDDEN, LAYERS, QUERIES = 64, 8, 96, 3, 20
NAMES = [f"class {i}" for i in range(7)]
CLOSE = dict(atol=1e-4, rtol=1e-4)


def scramble(module: nn.Module) -> nn.Module:
    """Weights of a size that lets nothing vanish."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() > 1 else 0.3)
    return module.eval().requires_grad_(False)


def load(ours: nn.Module, theirs: nn.Module, modules: dict[str, str], **others) -> None:
    """`modules`: names, ours -> theirs; everything that ours has must be named."""
    state = theirs.state_dict()
    renamed = {
        mine + key.removeprefix(yours): value
        for mine, yours in modules.items()
        for key, value in state.items()
        if key.startswith(f"{yours}.")
    }
    ours.eval().load_state_dict(renamed | others)


def deformable_attention() -> DeformableAttention:
    return DeformableAttention(DIM, HEADS, levels=4, points=4)


def deformable_names(mine: str, yours: str) -> dict[str, str]:
    same = ("sampling_offsets", "attention_weights", "value_proj")
    names = {f"{mine}.{name}": f"{yours}.{name}" for name in same}
    return names | {f"{mine}.out_proj": f"{yours}.output_proj"}


def text_of(images: int):
    return ClassVocabulary(NAMES)([Prompt.from_phrases(NAMES)] * images)


class GridEncoding(nn.Module):
    """DINO's, in the place of Deformable DETR's."""

    def forward(self, shape, device, dtype, mask):
        return grid_encoding(mask, DIM, 20.0).transpose(1, 2).unflatten(2, mask.shape[1:])


@torch.no_grad()
def test_neck_and_encoder():
    """A padded batch of two sizes."""
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=[2, 3, 4],
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        d_model=DIM,
        encoder_layers=LAYERS,
        decoder_layers=1,
        encoder_ffn_dim=HIDDEN,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        num_feature_levels=4,
    )
    theirs = scramble(transformers.DeformableDetrModel(config))
    theirs.position_embedding = GridEncoding()
    sizes, canvas = ((90, 101), (77, 120)), (90, 120)
    pixels, real = torch.randn(2, 3, *canvas), torch.zeros(2, *canvas, dtype=torch.long)
    for i, (height, width) in enumerate(sizes):
        real[i, :height, :width] = 1
    expected = theirs(pixels, pixel_mask=real).encoder_last_hidden_state

    neck = GroupNormNeck([24, 32, 40], DIM, levels=4)
    load(neck, theirs, {f"layers.{i}": f"input_proj.{i}" for i in range(4)})
    image = DeformableImageLayer(DIM, deformable_attention(), FeedForward(DIM, HIDDEN))
    enhancer = DeformableEnhancer(DIM, 4, EnhancerLayer(None, None, image), LAYERS)
    names = {}
    for i in range(LAYERS):
        mine, yours = f"layers.{i}.image", f"encoder.layers.{i}"
        names |= deformable_names(f"{mine}.self_attention", f"{yours}.self_attn") | {
            f"{mine}.norm1": f"{yours}.self_attn_layer_norm",
            f"{mine}.ffn.linear1": f"{yours}.mlp.fc1",
            f"{mine}.ffn.linear2": f"{yours}.mlp.fc2",
            f"{mine}.norm2": f"{yours}.final_layer_norm",
        }
    load(enhancer, theirs, names, level_embed=theirs.level_embed)

    maps = [m for m, _ in theirs.backbone(pixels, real)]
    maps = neck(dict(zip(("p3", "p4", "p5"), maps, strict=True)))
    masks = {
        name: content_mask(sizes, canvas, tuple(x.shape[-2:]), x.device, False)
        for name, x in maps.items()
    }
    memory, _, routings = enhancer(maps, masks, text_of(2))
    assert not memory.mask.all() and not routings
    torch.testing.assert_close(memory.tokens[memory.mask], expected[memory.mask], **CLOSE)


class Positions(nn.Module):
    """DINO's query positions, in the place of RT-DETR's; not one of its modules."""

    def __init__(self, position: nn.Module) -> None:
        super().__init__()
        self.position = [position]

    def forward(self, boxes):
        return self.position[0](boxes)


def rt_detr() -> nn.Module:
    config = transformers.RTDetrConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 8, 8],
            depths=[1, 1, 1, 1],
            out_indices=[2, 3, 4],
        ),
        encoder_in_channels=[8, 8, 8],
        encoder_hidden_dim=16,
        d_model=DIM,
        num_queries=QUERIES,
        num_labels=len(NAMES),
        decoder_in_channels=[DIM] * 4,
        num_feature_levels=4,
        decoder_layers=LAYERS,
        decoder_ffn_dim=HIDDEN,
        decoder_attention_heads=HEADS,
        learn_initial_query=True,
        anchor_image_size=None,
        num_denoising=0,
    )
    theirs = scramble(transformers.RTDetrForObjectDetection(config)).model
    theirs.decoder_input_proj = nn.ModuleList(nn.Identity() for _ in range(4))
    return theirs


@torch.no_grad()
def test_query_selection_and_decoder():
    theirs = rt_detr()
    selection = QuerySelection(DIM, QUERIES, LinearHead(DIM, len(NAMES)), rank_unusable=True)
    heads = {f"box_head.layers.{2 * j}": f"enc_bbox_head.layers.{j}" for j in range(3)}
    load(
        selection,
        theirs,
        {
            "proj": "enc_output.0",
            "norm": "enc_output.1",
            "class_head.linear": "enc_score_head",
            "content": "weight_embedding",
            **heads,
        },
    )
    layer = DecoderLayer(
        DIM, HEADS, deformable_attention(), FeedForward(DIM, HIDDEN), attend_text=False
    )
    decoder = Decoder(DIM, layer, LAYERS, LinearHead(DIM, len(NAMES)), separate_heads=True)
    decoder.norm = nn.Identity()  # RT-DETR has none
    scramble(decoder.position)
    names = {}
    for i in range(LAYERS):
        mine, yours = f"layers.{i}", f"decoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj"):
            names[f"{mine}.self_attention.{name}"] = f"{yours}.self_attn.{name}"
        names |= deformable_names(f"{mine}.image_attention", f"{yours}.encoder_attn") | {
            f"{mine}.self_attention.out_proj": f"{yours}.self_attn.o_proj",
            f"{mine}.norm1": f"{yours}.self_attn_layer_norm",
            f"{mine}.norm3": f"{yours}.encoder_attn_layer_norm",
            f"{mine}.ffn.linear1": f"{yours}.mlp.fc1",
            f"{mine}.ffn.linear2": f"{yours}.mlp.fc2",
            f"{mine}.norm4": f"{yours}.final_layer_norm",
            f"class_head.{i}.linear": f"decoder.class_embed.{i}",
        }
        for j in range(3):
            names[f"box_head.{i}.layers.{2 * j}"] = f"decoder.bbox_embed.{i}.layers.{j}"
    position = {f"position.{key}": value for key, value in decoder.position.state_dict().items()}
    load(decoder, theirs, names, **position)
    theirs.decoder.query_pos_head = Positions(decoder.position)
    content = theirs.weight_embedding.weight
    del theirs.weight_embedding
    theirs.weight_embedding = content  # transformers 5.23 uses it as a tensor, which it isn't

    shapes = [(9, 11), (5, 6), (3, 3), (2, 2)]
    while True:  # until both must rank the tokens alike
        maps = [torch.randn(2, DIM, *shape) for shape in shapes]
        expected = theirs(
            torch.zeros(2, 3, 8, 8),
            inputs_embeds=torch.zeros(2),
            encoder_outputs=BaseModelOutput(last_hidden_state=maps),
        )
        scores = expected.enc_outputs_class.amax(-1).topk(QUERIES + 1).values
        if -scores.diff().amax() > 1e-5:
            break
    memory = ImageMemory(
        tokens=torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1),
        mask=torch.ones(2, sum(h * w for h, w in shapes), dtype=torch.bool),
        shapes=shapes,
        valid_ratios=torch.ones(2, 4, 2),
        scene=torch.zeros(2, DIM),
    )
    text = text_of(2)
    queries, proposals = selection(memory, text)
    torch.testing.assert_close(queries.boxes, expected.enc_topk_bboxes, **CLOSE)
    torch.testing.assert_close(proposals.logits, expected.enc_topk_logits, **CLOSE)
    layers = decoder(queries, memory, text).layers
    assert len(layers) == LAYERS
    for i, mine in enumerate(layers):
        boxes = expected.intermediate_reference_points[:, i]
        torch.testing.assert_close(mine.boxes, boxes, **CLOSE)
        torch.testing.assert_close(mine.logits, expected.intermediate_logits[:, i], **CLOSE)
    assert (layers[2].boxes - layers[0].boxes).abs().max() > 0.05
