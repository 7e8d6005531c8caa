"""What Grounding DINO's weights are called here, in transformers, and in IDEA's original code.

One table gives the other two names of each of our weights, so that import and export can't differ.
Names of IDEA's are those of github.com/IDEA-Research/GroundingDINO, and what its modules would be
called with the heads of MM-Grounding-DINO; mmdetection's become those first (`mmdetection_names`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

LAYOUTS = ("transformers", "idea")

# One module a line: ours, transformers', IDEA's. <i> and <j> are numbers, <p> is the parameter;
# [k] is the k-th third of a tensor, and names with "&" between them are to be joined.
TABLE = """
text_encoder.body.<p>  model.text_backbone.<p>  bert.<p>
text_encoder.proj.<p>  model.text_projection.<p>  feat_map.<p>
neck.layers.<i>.<p>  model.input_proj_vision.<i>.<p>  input_proj.<i>.<p>
enhancer.level_embed  model.level_embed  transformer.level_embed
decoder.norm.<p>  model.decoder.layer_norm.<p>  transformer.decoder.norm.<p>
decoder.class_head.bias  class_embed.0.bias  class_embed.0.bias
decoder.class_head.<i>.bias  class_embed.<i>.bias  class_embed.<i>.bias
decoder.box_head.layers.<i>.<p>  bbox_embed.0.layers.<i/2>.<p>  bbox_embed.0.layers.<i/2>.<p>
"""

# Modules in modules: (ours, transformers', IDEA's) prefixes, and what stands behind them.
NESTED = {
    ("query_selection", "model", "transformer"): """
proj.<p>  enc_output.<p>  enc_output.<p>
norm.<p>  enc_output_norm.<p>  enc_output_norm.<p>
content.<p>  query_position_embeddings.<p>  tgt_embed.<p>
class_head.bias  encoder_output_class_embed.bias  enc_out_class_embed.bias
""",
    ("decoder.box_head.<i>.layers", "bbox_embed.<i>.layers", "bbox_embed.<i>.layers"): """
<j>.<p>  <j/2>.<p>  <j/2>.<p>
""",
    (
        "query_selection.box_head.layers",
        "model.encoder_output_bbox_embed.layers",
        "transformer.enc_out_bbox_embed.layers",
    ): """
<i>.<p>  <i/2>.<p>  <i/2>.<p>
""",
    (
        "decoder.position.layers",
        "model.decoder.reference_points_head.layers",
        "transformer.decoder.ref_point_head.layers",
    ): """
<i>.<p>  <i/2>.<p>  <i/2>.<p>
""",
    ("backbone", "model.backbone.conv_encoder.model", "backbone.0"): """
body.patch_embed.proj.<p>  embeddings.patch_embeddings.projection.<p>  patch_embed.proj.<p>
body.patch_embed.norm.<p>  embeddings.norm.<p>  patch_embed.norm.<p>
body.layers_<i>.downsample.<p>  encoder.layers.<i-1>.downsample.<p>  layers.<i-1>.downsample.<p>
out_norm.<i>.<p>  hidden_states_norms.stage<i+2>.<p>  norm<i+1>.<p>
""",
    (
        "backbone.body.layers_<i>.blocks.<j>",
        "model.backbone.conv_encoder.model.encoder.layers.<i>.blocks.<j>",
        "backbone.0.layers.<i>.blocks.<j>",
    ): """
norm1.<p>  layernorm_before.<p>  norm1.<p>
norm2.<p>  layernorm_after.<p>  norm2.<p>
mlp.fc1.<p>  intermediate.dense.<p>  mlp.fc1.<p>
mlp.fc2.<p>  output.dense.<p>  mlp.fc2.<p>
""",
    (
        "backbone.body.layers_<i>.blocks.<j>.attn",
        "model.backbone.conv_encoder.model.encoder.layers.<i>.blocks.<j>.attention",
        "backbone.0.layers.<i>.blocks.<j>.attn",
    ): """
relative_position_bias_table  self.relative_position_bias_table  relative_position_bias_table
qkv.<p>  self.query.<p>&self.key.<p>&self.value.<p>  qkv.<p>
proj.<p>  output.dense.<p>  proj.<p>
""",
    (
        "enhancer.layers.<i>.fusion",
        "model.encoder.layers.<i>.fusion_layer",
        "transformer.encoder.fusion_layers.<i>",
    ): """
norm_image.<p>  layer_norm_vision.<p>  layer_norm_v.<p>
norm_text.<p>  layer_norm_text.<p>  layer_norm_l.<p>
image_query.<p>  attn.vision_proj.<p>  attn.v_proj.<p>
text_key.<p>  attn.text_proj.<p>  attn.l_proj.<p>
image_value.<p>  attn.values_vision_proj.<p>  attn.values_v_proj.<p>
text_value.<p>  attn.values_text_proj.<p>  attn.values_l_proj.<p>
image_out.<p>  attn.out_vision_proj.<p>  attn.out_v_proj.<p>
text_out.<p>  attn.out_text_proj.<p>  attn.out_l_proj.<p>
image_scale  vision_param  gamma_v
text_scale  text_param  gamma_l
""",
    (
        "enhancer.layers.<i>.text",
        "model.encoder.layers.<i>.text_enhancer_layer",
        "transformer.encoder.text_layers.<i>",
    ): """
self_attention.q_proj.<p>  self_attn.query.<p>  self_attn.in_proj_<p>[0]
self_attention.k_proj.<p>  self_attn.key.<p>  self_attn.in_proj_<p>[1]
self_attention.v_proj.<p>  self_attn.value.<p>  self_attn.in_proj_<p>[2]
self_attention.out_proj.<p>  self_attn.out_proj.<p>  self_attn.out_proj.<p>
norm1.<p>  layer_norm_before.<p>  norm1.<p>
ffn.linear1.<p>  fc1.<p>  linear1.<p>
ffn.linear2.<p>  fc2.<p>  linear2.<p>
norm2.<p>  layer_norm_after.<p>  norm2.<p>
""",
    (
        "enhancer.layers.<i>.image",
        "model.encoder.layers.<i>.deformable_layer",
        "transformer.encoder.layers.<i>",
    ): """
self_attention.out_proj.<p>  self_attn.output_proj.<p>  self_attn.output_proj.<p>
self_attention.<p>  self_attn.<p>  self_attn.<p>
norm1.<p>  self_attn_layer_norm.<p>  norm1.<p>
ffn.linear1.<p>  fc1.<p>  linear1.<p>
ffn.linear2.<p>  fc2.<p>  linear2.<p>
norm2.<p>  final_layer_norm.<p>  norm2.<p>
""",
    (
        "decoder.layers.<i>",
        "model.decoder.layers.<i>",
        "transformer.decoder.layers.<i>",
    ): """
self_attention.q_proj.<p>  self_attn.query.<p>  self_attn.in_proj_<p>[0]
self_attention.k_proj.<p>  self_attn.key.<p>  self_attn.in_proj_<p>[1]
self_attention.v_proj.<p>  self_attn.value.<p>  self_attn.in_proj_<p>[2]
self_attention.out_proj.<p>  self_attn.out_proj.<p>  self_attn.out_proj.<p>
norm1.<p>  self_attn_layer_norm.<p>  norm2.<p>
text_attention.q_proj.<p>  encoder_attn_text.query.<p>  ca_text.in_proj_<p>[0]
text_attention.k_proj.<p>  encoder_attn_text.key.<p>  ca_text.in_proj_<p>[1]
text_attention.v_proj.<p>  encoder_attn_text.value.<p>  ca_text.in_proj_<p>[2]
text_attention.out_proj.<p>  encoder_attn_text.out_proj.<p>  ca_text.out_proj.<p>
norm2.<p>  encoder_attn_text_layer_norm.<p>  catext_norm.<p>
image_attention.out_proj.<p>  encoder_attn.output_proj.<p>  cross_attn.output_proj.<p>
image_attention.<p>  encoder_attn.<p>  cross_attn.<p>
norm3.<p>  encoder_attn_layer_norm.<p>  norm1.<p>
ffn.linear1.<p>  fc1.<p>  linear1.<p>
ffn.linear2.<p>  fc2.<p>  linear2.<p>
norm4.<p>  final_layer_norm.<p>  norm3.<p>
""",
}

# Names that transformers 5 gives to some modules in memory; its files have the older ones.
_IN_MEMORY = [
    (r"(conv_encoder\.model\.)swin\.(?=encoder|embeddings)", r"\1"),
    (r"(conv_encoder\..*attention\.)(q|k|v)_proj\.", r"\1self.\2."),
    (r"(conv_encoder\..*self\.)q\.", r"\1query."),
    (r"(conv_encoder\..*self\.)k\.", r"\1key."),
    (r"(conv_encoder\..*self\.)v\.", r"\1value."),
    (r"(conv_encoder\..*attention\.)o_proj\.", r"\1output.dense."),
    (r"(conv_encoder\..*attention\.)relative_position_bias\.", r"\1self."),
    (r"(conv_encoder\..*)mlp\.fc1\.", r"\1intermediate.dense."),
    (r"(conv_encoder\..*)mlp\.fc2\.", r"\1output.dense."),
]

# What files hold besides: numbers that follow from the architecture, a norm and a pooling that the
# detector doesn't have, and the label embeddings of IDEA's and mmdetection's training code.
UNUSED = re.compile(
    r"relative_position_index$|position_ids$|attn_mask$|\.pooler\.|^label_enc\.weight$"
    r"|^dn_query_generator\.label_embedding\.weight$"
    r"|conv_encoder\.model\.(swin\.)?layernorm\."
)


def their_names(ours: str, layout: str) -> tuple[str, ...] | None:
    """The weights in a "transformers" or "idea" checkpoint that one of ours is made of, joined
    along the first dimension. "name[k]" is the k-th third of a weight. None: it has no such."""
    for pattern, *templates in _rules():
        match = pattern.fullmatch(ours)
        if match:
            template = templates[LAYOUTS.index(layout)]
            return None if template == "-" else tuple(_fill(template, match).split("&"))
    return None


def canonical_name(theirs: str) -> str:
    """A name as files have it: without DataParallel's prefix, and as older transformers wrote it.

    Copies that the models keep of the decoder's heads get the name of what they are copies of.
    """
    name = theirs.removeprefix("module.")
    for pattern, replacement in _IN_MEMORY:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^(model|transformer)\.decoder\.(bbox_embed|class_embed)\.", r"\2.", name)


@cache
def _rules() -> list[tuple[re.Pattern, str, str]]:
    return [
        (re.compile(re.sub(r"<(\w)>", _group, re.escape(ours))), transformers, idea)
        for ours, transformers, idea in _lines()
    ]


def _lines() -> Iterator[list[str]]:
    for line in TABLE.strip().splitlines():
        yield line.split()
    for prefixes, lines in NESTED.items():
        for line in lines.strip().splitlines():
            yield [
                "&".join(f"{prefix}.{name}" for name in names.split("&"))
                for prefix, names in zip(prefixes, line.split(), strict=True)
            ]


def _group(match: re.Match) -> str:
    return f"(?P<{match[1]}>.+)" if match[1] == "p" else rf"(?P<{match[1]}>\d+)"


def _fill(template: str, match: re.Match) -> str:
    def value(slot: re.Match) -> str:
        name, change = slot[1], slot[2]
        if not change:
            return match[name]
        number, by = int(match[name]), int(change[1:])
        return str({"+": number + by, "-": number - by, "/": number // by}[change[0]])

    return re.sub(r"<(\w)([-+/]\d)?>", value, template)
