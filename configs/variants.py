"""Variants of recipes, a line each: RECIPE:NAME -> what it is, and what it changes of the recipe.

    train_net.py --variant himoe/dino:x16_top1
    train_net.py --config-file configs/himoe/dino.py --variant x16_top1

A recipe is a file where it is a published model or of another structure; other values of its keys
are lines here. Wherever a command takes a recipe, configs/himoe/dino.py:x16_top1 is this variant.
"""

FFN = "model.decoder.layer.ffn"
ROUTER = f"{FFN}.router"
IMAGE_ROUTER = "model.enhancer.layer.image.ffn.router"
BALANCE = "model.criterion.router_losses.0.weight"

EXPERTS = "'*.ffn.experts.*','*.ffn.router.*'"
FUSION = "'enhancer.layers.*.fusion.*'"
HEADS = "'*.class_head.*','*.box_head.*'"

NEW_EXPERTS, UNTIED = f"{FFN}.init_experts=false", f"{ROUTER}.tied=false"


def sizes(num_experts: int, top_k: int) -> list[str]:
    return [f"{ROUTER}.num_experts={num_experts}", f"{ROUTER}.top_k={top_k}"]


DYNAMIC_DINO = {
    "top1_x8": ("8 experts, K = 1; by the paper's gate the same model", sizes(8, 1)),
    "top4_x32": ("32 experts, K = 4; by the paper's gate the same model", sizes(32, 4)),
    "gate_renormalized": ("the renormalised gate", [f"{ROUTER}.gate=renormalized"]),
    "gate_straight_through": (
        "the straight-through gate",
        [f"{ROUTER}.gate=straight_through"],
    ),
    "untied": ("router rows drawn apart", [UNTIED]),
    "without_init": ("Dynamic-DINO Table 10, without initialisation", [NEW_EXPERTS, UNTIED]),
    "alpha_0": ("no load balance", [f"{BALANCE}=0.0"]),
    "alpha_0.1": ("ten times the load balance", [f"{BALANCE}=0.1"]),
    "balance_sum": (
        "the load balance added up over layers, as Switch Transformer's code does",
        ["model.criterion.router_losses.0.over_layers=sum"],
    ),
    "trains_experts": ("experts alone train", [f"train.trainable=[{EXPERTS}]"]),
    "trains_experts_fusion": ("heads don't train", [f"train.trainable=[{EXPERTS},{FUSION}]"]),
    "trains_experts_heads": ("fusion doesn't train", [f"train.trainable=[{EXPERTS},{HEADS}]"]),
}
DYNAMIC_DINO_NANO = DYNAMIC_DINO | {  # Edge has files for these, the paper's models
    "x4": ("Dynamic-DINO Table 8, x4-Top2", sizes(4, 2)),
    "x8": ("Dynamic-DINO Table 8, x8-Top2", sizes(8, 2)),
}
GDINO = {
    "x4": ("x4-Top2, 2 copies of each FFN cut in two", [f"{ROUTER}.num_experts=4"]),
    "x8": ("x8-Top2, 4 copies of each FFN cut in two", [f"{ROUTER}.num_experts=8"]),
}
HIMOE = {
    "instance_only": ("HI-MoE Table 4, instance only", [f"{ROUTER}.variant=instance"]),
    "scene_only": ("HI-MoE Table 4, scene only", [f"{ROUTER}.variant=scene"]),
    "x16_top1": ("HI-MoE Table 5, K = 1", [f"{ROUTER}.top_k=1"]),
    "x16_top4": ("HI-MoE Table 5, K = 4", [f"{ROUTER}.top_k=4"]),
    "x4_top2": ("HI-MoE Table 6, 4 experts", [f"{ROUTER}.num_experts=4"]),
    "x8_top2": ("HI-MoE Table 6, 8 experts", [f"{ROUTER}.num_experts=8"]),
}
# The other reading of the experts' size. What K adds to the GFLOPs of HI-MoE's Table 5 speaks for
# experts of the FFN's size, as in the recipes; its Table 3, 50M -> 52M, for small ones, which can't
# start from a dense FFN: 6 layers * (16 * (168 * 513 + 256) + 5184 - 1.05M) = 2.0M; Edge:
# 6 * (16 * 160 * 513 - 1.05M) = 1.6M.
HIMOE_DINO = HIMOE | {
    "small_experts": ("experts of 168 units", [f"{FFN}.expert_hidden=168", NEW_EXPERTS])
}
HIMOE_EDGE = HIMOE | {
    "small_experts": ("experts of 160 units", [f"{FFN}.expert_hidden=160", NEW_EXPERTS])
}
# Two whole experts for each of 21,000 image tokens cost much more than the paper's 285 GFLOPs; with
# top_k=1 they cost what the dense FFN costs.
HIMOE_ENCODER = {
    "token_moe": ("HI-MoE Table 4, Token-MoE: by image token", [f"{IMAGE_ROUTER}.variant=instance"])
}
DYNMOE = {
    "max16": ("at most 16 experts", [f"{ROUTER}.num_experts=16"]),
    "fixed": (
        "8 experts that stay",
        [f"{ROUTER}.initial_experts=8", "train.adaptive_experts.enabled=false"],
    ),
}
PHOTOS = {
    "unfrozen": (
        "goes on from pretrain/nano_photos, with its backbone at a tenth of the rate",
        [
            "model.backbone.frozen=false",
            "train.init_checkpoint=output/nano_photos/model_final.pth",
            "train.max_iter=4500",
            "optimizer.lr=4e-4",
        ],
    ),
    "control": (
        "the control of moe_tuning/nano_x16_photos",
        [
            f"train.trainable=[{FUSION},'decoder.layers.*.ffn.*',{HEADS}]",
            "train.init_checkpoint=package:dynamic_dino/weights/nano_photos.safetensors",
            "train.max_iter=1250",
            "optimizer.lr=1e-4",
        ],
    ),
}

VARIANTS = {
    f"{recipe}:{name}": variant
    for recipe, variants in {
        "moe_tuning/dynamic_dino_x16_top2": DYNAMIC_DINO,
        "moe_tuning/nano_x16_stamps": DYNAMIC_DINO_NANO,
        "moe_tuning/nano_x16_glyphs": DYNAMIC_DINO_NANO,
        "moe_tuning/gdino_tiny_x16": GDINO,
        "pretrain/nano_photos": PHOTOS,
        "himoe/dino": HIMOE_DINO,
        "himoe/edge": HIMOE_EDGE,
        "himoe/nano_x16_stamps": HIMOE,
        "himoe/nano_x16_glyphs": HIMOE,
        "himoe/nano_x16_photos": HIMOE,
        "himoe/dino_encoder": HIMOE_ENCODER,
        "himoe/edge_encoder": HIMOE_ENCODER,
        "himoe/nano_encoder_stamps": HIMOE_ENCODER,
        "dynmoe/edge": DYNMOE,
        "dynmoe/nano_stamps": DYNMOE,
        "dynmoe/nano_glyphs": DYNMOE,
    }.items()
    for name, variant in variants.items()
}
