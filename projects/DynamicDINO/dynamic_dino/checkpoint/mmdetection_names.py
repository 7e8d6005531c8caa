"""mmdetection's weights of (MM-)Grounding-DINO under the names of IDEA's code, which it follows.

Names are those of github.com/open-mmlab/mmdetection, ``GroundingDINO``. Two things are no matter of
names: the heads of the query selection come after those of the decoder's layers, in one list, and
Swin merges patches by torch's unfold, whose channels are in another order.
"""

from __future__ import annotations

import re

from torch import Tensor

# Applied one after the other
RULES = [
    (r"^language_model\.language_backbone\.body\.model\.", "bert."),
    (r"^text_feat_map\.", "feat_map."),
    (r"^level_embed$", "transformer.level_embed"),
    (r"^query_embedding\.", "transformer.tgt_embed."),
    (r"^memory_trans_fc\.", "transformer.enc_output."),
    (r"^memory_trans_norm\.", "transformer.enc_output_norm."),
    (r"^neck\.convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.gn\.", r"input_proj.\1.1."),
    # Swin
    (r"^backbone\.", "backbone.0."),
    (r"^(backbone\.0\.)stages\.", r"\1layers."),
    (r"^(backbone\.0\.patch_embed\.)projection\.", r"\1proj."),
    (r"^(backbone\..*\.attn\.)w_msa\.", r"\1"),
    (r"^(backbone\..*\.)ffn\.layers\.0\.0\.", r"\1mlp.fc1."),
    (r"^(backbone\..*\.)ffn\.layers\.1\.", r"\1mlp.fc2."),
    # Encoder and decoder
    (r"^(encoder|decoder)\.", r"transformer.\1."),
    (r"\.self_attn\.attn\.", ".self_attn."),
    (r"\.cross_attn_text\.attn\.", ".ca_text."),
    (r"\.ffn\.layers\.0\.0\.", ".linear1."),
    (r"\.ffn\.layers\.1\.", ".linear2."),
    (r"(\.encoder\..*)\.norms\.0\.", r"\1.norm1."),
    (r"(\.encoder\..*)\.norms\.1\.", r"\1.norm2."),
    (r"(\.decoder\..*)\.norms\.0\.", r"\1.norm2."),
    (r"(\.decoder\..*)\.norms\.1\.", r"\1.catext_norm."),
    (r"(\.decoder\..*)\.norms\.2\.", r"\1.norm1."),
    (r"(\.decoder\..*)\.norms\.3\.", r"\1.norm3."),
    # Heads, whose linear layers are numbers 0, 2, 4
    (r"^(bbox_head\.reg_branches\.\d+\.)2\.", r"\1layers.1."),
    (r"^(bbox_head\.reg_branches\.\d+\.)4\.", r"\1layers.2."),
    (r"^(bbox_head\.reg_branches\.\d+\.)0\.", r"\1layers.0."),
]


def is_mmdetection(state: dict[str, Tensor]) -> bool:
    """Whether the names are mmdetection's."""
    return any(name.startswith("bbox_head.reg_branches.") for name in state)


def as_idea(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in IDEA's code; those that Grounding DINO doesn't have stay as they are, or nearly.

    Biases of classes, which IDEA's code has not, get the names of its (empty) class heads.
    """
    heads = max(int(n.split(".")[2]) for n in state if n.startswith("bbox_head.reg_branches."))
    maps = len({name.split(".")[2] for name in state if name.startswith("neck.convs.")})
    result = {}
    for name, value in state.items():
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        for branch, kind in (("reg", "bbox"), ("cls", "class")):
            name = name.replace(
                f"bbox_head.{branch}_branches.{heads}.", f"transformer.enc_out_{kind}_embed."
            )
            name = name.replace(f"bbox_head.{branch}_branches.", f"{kind}_embed.")
        extra = re.fullmatch(r"neck\.extra_convs\.(\d+)\.(conv|gn)(\..*)", name)
        if extra:
            name = f"input_proj.{maps + int(extra[1])}.{['conv', 'gn'].index(extra[2])}{extra[3]}"
        merges = re.search(r"^backbone\..*\.downsample\.(reduction|norm)\.", name)
        result[name] = from_unfold(value) if merges else value
    return result


def from_unfold(weight: Tensor) -> Tensor:
    """Inputs of Swin's patch merging [..., 4 C], from the order of torch's unfold (channel, row,
    column) to the original's (column, row, channel)."""
    patches = weight.unflatten(-1, (-1, 2, 2))
    return patches.movedim((-1, -2, -3), (-3, -2, -1)).flatten(-3).contiguous()
