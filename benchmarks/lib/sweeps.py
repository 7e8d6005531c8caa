"""The sweeps of ablations.py: settings, their rows, and the questions that tables of rows answer.

A `Setting` is data, a base checkpoint and a length of training that its rows share; a `Row` is a
recipe with overrides. A row is trained once for all sweeps that show it. Each sweep has a control,
which the others are compared with: where a dense model is tuned, it is that same model, tuned as
dense for as long, on the same data in the same order, with the same parameters free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dynamic_dino.config import variants

VARIANTS = variants(Path(__file__).parents[2] / "configs")
EXPERTS_ALONE = "'*.ffn.experts.*'"
FUSION, HEADS = "'enhancer.layers.*.fusion.*'", "'*.class_head.*','*.box_head.*'"
FFN = "model.decoder.layer.ffn"
STD = f"{FFN}.router.std"
ALL_TRAINS = "train.trainable=null"


@dataclass(frozen=True)
class Row:
    """A recipe under configs/, without ".py", and what is changed of it.

    base   the row whose last weights with the same seed it starts from; None: from what the recipe
           names
    once   trained with seed 0 alone: all that start from it share it
    """

    title: str
    config: str
    overrides: tuple[str, ...] = ()
    base: str | None = None
    once: bool = False


@dataclass(frozen=True)
class Setting:
    """What rows share.

    tests      names of the test sets; differences are drawn for the first
    overrides  of every row
    photos     those of the tests that are a few hundred photos or fewer
    features   where the mappers' backbone features are cached: "train", "test" -> folder
    """

    name: str
    title: str
    tests: tuple[str, ...]
    rows: Mapping[str, Row]
    overrides: tuple[str, ...] = ()
    photos: tuple[str, ...] = ()
    features: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Sweep:
    """A table: rows of a setting beside their control; `note` says what it shows."""

    name: str
    title: str
    setting: str
    control: str
    rows: tuple[str, ...]
    note: str = ""


def changed(row: Row, *overrides: str, **fields: str | None) -> Row:
    """A row with more overrides, and other fields where they are given."""
    return replace(row, overrides=(*row.overrides, *overrides), **fields)


def widened(units: int) -> tuple[str, str]:
    """Overrides: the decoder's dense FFN with so many units, of which the base brings the first."""
    return f"{FFN}.hidden={units}", f"{FFN}.widen=true"


def variant(title: str, name: str, *overrides: str) -> Row:
    """One of configs/variants.py, such as "himoe/dino:x16_top1", and what else is changed."""
    return Row(title, name.partition(":")[0], (*VARIANTS[name][1], *overrides))


def dynamic(setting: str) -> dict[str, Row]:
    """Dynamic-DINO and what varies of it, with its control."""
    recipe = f"moe_tuning/nano_x16_{setting}"

    def of(title: str, name: str) -> Row:
        return variant(title, f"{recipe}:{name}")

    renormalized = of("x16, renormalised gate", "gate_renormalized")
    return {
        "control": Row("dense", f"moe_tuning/nano_dense_control_{setting}"),
        "x16": Row("x16-Top2", recipe),
        "x8": of("x8-Top2", "x8"),
        "x4": of("x4-Top2", "x4"),
        "parts": Row("x16, each part once (ours)", f"moe_tuning/nano_x16_parts_{setting}"),
        "renormalized": renormalized,
        # With the paper's gate all k are one and the same model.
        "top1_x8": changed(renormalized, *VARIANTS[f"{recipe}:top1_x8"][1], title="x8-Top1"),
        "top4_x32": changed(renormalized, *VARIANTS[f"{recipe}:top4_x32"][1], title="x32-Top4"),
        "straight_through": of("x16, straight-through gate", "gate_straight_through"),
        "without_init": of("... random experts, too", "without_init"),
        "untied": of("... router rows apart", "untied"),
        "alpha_0": of("x16, random router that stays (alpha 0)", "alpha_0"),
        "alpha_0.1": of("x16, alpha 0.1", "alpha_0.1"),
        "only_experts": of("x16, experts alone train", "trains_experts"),
        "without_heads": of("x16, heads don't train", "trains_experts_fusion"),
        "without_fusion": of("x16, fusion doesn't train", "trains_experts_heads"),
    }


DYNAMIC = {
    "table8": ("How many experts (Dynamic-DINO's Table 8)", ("x4", "x8", "x16")),
    "table10": (
        "Initialisation from the dense FFN (Table 10)",
        ("x16", "untied", "without_init"),
    ),
    "k": (
        "Active experts, of equal size together, by the renormalised gate",
        ("top1_x8", "renormalized", "top4_x32"),
    ),
    "alpha": ("Weight of the load balance", ("alpha_0", "x16", "alpha_0.1")),
    "trained": ("What trains", ("only_experts", "without_heads", "without_fusion", "x16")),
}


OFTEN = ("train.adaptive_experts.period=50", "train.adaptive_experts.window=50")


def other_routers(setting: str) -> dict[str, Row]:
    """HI-MoE and DynMoE, and what varies of them."""
    himoe, dynmoe = f"himoe/nano_x16_{setting}", f"dynmoe/nano_{setting}"
    return {
        "himoe_instance": variant("HI-MoE, instance only", f"{himoe}:instance_only"),
        "himoe_scene": variant("HI-MoE, scene only", f"{himoe}:scene_only"),
        "himoe_x16": Row("HI-MoE, 16 experts, K = 2", himoe),
        "himoe_top1": variant("HI-MoE, 16 experts, K = 1", f"{himoe}:x16_top1"),
        "himoe_top4": variant("HI-MoE, 16 experts, K = 4", f"{himoe}:x16_top4"),
        "himoe_x8": variant("HI-MoE, 8 experts, K = 2", f"{himoe}:x8_top2"),
        "himoe_x4": variant("HI-MoE, 4 experts, K = 2", f"{himoe}:x4_top2"),
        "dynmoe": Row("DynMoE, 6 of at most 8 experts at the start", dynmoe, OFTEN),
        "dynmoe_fixed": variant("DynMoE, 8 experts that stay", f"{dynmoe}:fixed"),
        "dynmoe_max16": variant("DynMoE, at most 16", f"{dynmoe}:max16", *OFTEN),
    }


STAMPS = Setting(
    "stamps",
    "nano on Stamps, MoE-Tuning of the shipped dense model",
    ("val", "val_novel", "val_real"),
    {
        **dynamic("stamps"),
        **other_routers("stamps"),
        "encoder": Row("x16 in the encoder too", "moe_tuning/nano_encoder_decoder_stamps"),
        "token_moe": variant("Token-MoE (image tokens)", "himoe/nano_encoder_stamps:token_moe"),
        "himoe_both": Row("HI-MoE, encoder and decoder", "himoe/nano_encoder_decoder_stamps"),
        "himoe_encoder": Row("HI-MoE, encoder", "himoe/nano_encoder_stamps"),
    },
    # 10,000 images * 0.1 epochs / 8 images = 125 iterations
    photos=("val_real",),
    overrides=("train.max_iter=125", "train.checkpointer.period=50", "train.eval_period=0"),
    features={"train": "datasets/stamps/features", "test": "datasets/stamps/features_test"},
)

WIDTHS = (0, 16, 32, 64, 128, 256)

# What a router's rows are drawn with: Algorithm 1's 1, and a small one, which an optimizer turns
# fast. Where a router stays as it was drawn it makes no difference.
ROUTED = ("x16", "parts", "renormalized", "straight_through")
SMALL = "_std_0.02"

# The grid: what a gain is compared with, from two bases, with two sets of parameters free.
GRID = ("control", "wide", "x16", "alpha_0")
MORE_OF_GRID = ("longer", "instance_stays", "himoe_instance", "wide_1024")
SETTINGS_OF_GRID = {
    "": "neck frozen in the base, the paper's parts train",
    "_all": "neck frozen in the base, everything trains",
    "_whole": "base trained as a whole, the paper's parts train",
    "_whole_all": "base trained as a whole, everything trains",
}


def glyph_rows() -> dict[str, Row]:
    rows = dynamic("glyphs") | other_routers("glyphs")
    control = rows["control"]
    rows["wide"] = changed(control, *widened(512), title="dense, as many parameters (512 units)")
    rows["parts"] = changed(rows["parts"], f"{STD}=1.0")
    rows["wide_1024"] = changed(
        control, *widened(1024), title="dense, as many as HI-MoE's (1024 units)"
    )
    instance = rows["himoe_instance"]
    rows["instance_stays"] = changed(
        instance,
        f"train.trainable=[{EXPERTS_ALONE},{FUSION},{HEADS}]",
        title="HI-MoE, instance only, random router that stays",
    )
    rows["instance_top1"] = changed(
        instance, f"{FFN}.router.top_k=1", title="HI-MoE, instance only, K = 1"
    )
    rows["longer"] = changed(control, "train.max_iter=1200", title="dense, three times as long")
    for name in ROUTED:
        title = f"{rows[name].title}, std 0.02"
        rows[name + SMALL] = changed(rows[name], f"{STD}=0.02", title=title)
    rows = {name: replace(row, base="ffn_64") for name, row in rows.items()}
    for tag in SETTINGS_OF_GRID:
        base = "ffn_64_whole" if "_whole" in tag else "ffn_64"
        free = [ALL_TRAINS] if tag.endswith("_all") else []
        for name in GRID:
            rows[name + tag] = changed(rows[name], *free, base=base)
    return rows


GLYPHS = Setting(
    "glyphs",
    "nano at a quarter of its width on glyphs, whose 720 names its decoder alone learns by heart",
    ("val",),
    {
        "described": Row("descriptions, all trains", "pretrain/nano_glyphs_described", once=True),
        **{
            f"ffn_{width}": Row(
                f"FFN of {width} units" if width else "without FFN",
                "pretrain/nano_glyphs",
                (f"model.decoder.layer.ffn.hidden={width}",),
                base="described",
            )
            for width in WIDTHS
        },
        "ffn_64_whole": Row(
            "FFN of 64 units, all trains",
            "pretrain/nano_glyphs",
            ("model.decoder.layer.ffn.hidden=64", ALL_TRAINS),
            base="described",
        ),
        **glyph_rows(),
    },
    features={"train": "datasets/glyphs/features/train", "test": "datasets/glyphs/features/test"},
)

PHOTO_CONTROL = variant("dense", "pretrain/nano_photos:control")
PHOTOS = Setting(
    "photos",
    "nano on photos and Stamps, MoE-Tuning of the shipped nano-photos",
    ("coco", "coco_present", "val", "val_real"),
    {
        "control": PHOTO_CONTROL,
        "control_all": changed(PHOTO_CONTROL, ALL_TRAINS, title="dense, everything trains"),
        "wide": changed(
            PHOTO_CONTROL,
            *widened(4096),
            title="dense, as many parameters (4096 units)",
        ),
        "x16": Row("x16-Top2", "moe_tuning/nano_x16_photos"),
        "parts": Row("x16, each part once (ours)", "moe_tuning/nano_x16_parts_photos"),
        "himoe_x16": Row("HI-MoE, 16 experts, K = 2", "himoe/nano_x16_photos"),
        "himoe_scene": variant("HI-MoE, scene only", "himoe/nano_x16_photos:scene_only"),
    },
    photos=("coco", "coco_present", "val_real"),
)

# What tables show, above them; a sweep without a note speaks for itself.
NOTES = {
    "capacity": """
**Capacity binds here**, in a whole detector, because it was built so: all rows start from a
detector that has learnt the pictures with descriptions ("red star with a blue disc": 93.7 AP50),
and learn what glyphs are called with their decoder alone, whose FFNs are as wide as the model,
where others are four to eight times as wide.""",
    "grid": """
**By the paper's router the gain is that of parameters.** x16-Top2 ends far above its control,
and so do a dense FFN of as many units and experts whose router stays as it was drawn; no
difference among the three that three seeds could show. **HI-MoE's router without its scene does
learn what pays**: with 16 whole copies, 2 for a query, it ends 2.9 ± 1.0 above the same router
as it was drawn, and level with a dense FFN of as many units. What experts have over the wide FFN
is their price (RESULTS.md, "an FFN as wide as all experts"). The control that is tuned three
times as long has three quarters of the gain; x16 is 1.9 ± 0.6 above it. Each seed has a base of
its own, so that its interval is that of pre-training and tuning together; the detector that has
learnt the pictures is one for all.""",
    "grid_all": """
**The same with everything free**: the control itself ends 21 AP higher, and x16-Top2, the wide
FFN and the router that stays random all end 6.6 to 7.7 above it, with no difference among the
three that three seeds could show.""",
    "glyphs_himoe": """
**The scene is in the way here**: a router that sees the token alone ends 6.2 ± 0.5 AP above one
that sees the scene first, and the scene alone brings nothing. Glyphs are strewn at random, and
the scene's pool leaves out half of the experts. With one expert a query, at the compute of the
narrow FFN, it is level with x16-Top2. 16 whole copies have 1024 units, x16-Top2 has 512.""",
    "glyphs_dynmoe": """
**DynMoE hardly gains here**, whether its experts come and go or stay (0.1 ± 0.6 between the
two): a query takes five of seven or eight, and the mean of their answers, for five times the
FFN's compute. A router that takes one or two of 16 gains more for less.""",
    "photos": """
**On photos MoE-Tuning ends where its control does**, on every set, by AP and AP50, **and so do
HI-MoE and a dense FFN of as many parameters**: here they are not what is missing. The x16 that
is shipped is seed 0.""",
    "glyphs_std": """
**Rows drawn with N(0, 1), as in Algorithm 1, are worth 2.0 ± 0.9 AP** over such as are drawn with
0.02, by the paper's gate. A router that stays as it was drawn does as well. Choosing each part
once, from small rows, is the best routing where FFNs are trained alone; in this detector it ends
2.2 ± 0.5 below the router that stays: what it learns doesn't pay here.""",
}

SETTINGS = {setting.name: setting for setting in (STAMPS, GLYPHS, PHOTOS)}

SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep(
            "routers",
            "Dynamic-DINO, Token-MoE, HI-MoE and DynMoE against the dense control",
            "stamps",
            "control",
            ("control", "x16", "token_moe", "himoe_x16", "dynmoe", "parts"),
            "So few iterations, where the FFN is no bottleneck, can't tell routers apart by AP:\n"
            "the table shows what they cost, and that all go on from the dense model.",
        ),
        Sweep(
            "capacity",
            "Where the decoder's FFN is a bottleneck: its width",
            "glyphs",
            "ffn_64",
            tuple(f"ffn_{width}" for width in WIDTHS),
            NOTES["capacity"],
        ),
        *(
            Sweep(
                name=f"{setting}_{name}",
                title=f"{title}, on {setting}",
                setting=setting,
                control="control",
                rows=("control", *rows),
                note=NOTES.get(f"{setting}_{name}", ""),
            )
            for setting in ("glyphs", "stamps")
            for name, (title, rows) in DYNAMIC.items()
        ),
        Sweep(
            "stamps_gates",
            "The three gates, on stamps",
            "stamps",
            "control",
            ("control", "x16", "renormalized", "straight_through", "parts"),
        ),
        Sweep(
            "glyphs_std",
            "What a router's rows are drawn with, and what the gate lets them learn",
            "glyphs",
            "control",
            (
                "control",
                "alpha_0",
                "x16",
                f"x16{SMALL}",
                f"parts{SMALL}",
                "renormalized",
                "straight_through",
            ),
            NOTES.get("glyphs_std", ""),
        ),
        *(
            Sweep(
                name=f"grid{tag}",
                title=f"What the gain is compared with: {title}",
                setting="glyphs",
                control=f"control{tag}",
                rows=(*(name + tag for name in GRID), *(MORE_OF_GRID if not tag else ())),
                note=NOTES.get(f"grid{tag}", ""),
            )
            for tag, title in SETTINGS_OF_GRID.items()
        ),
        Sweep(
            "glyphs_himoe",
            "HI-MoE: what chooses, and among how many experts (its Tables 4 to 6)",
            "glyphs",
            "control",
            (
                "control",
                "himoe_scene",
                "himoe_instance",
                "instance_stays",
                "instance_top1",
                "himoe_x16",
                "himoe_top1",
                "himoe_top4",
                "himoe_x4",
                "himoe_x8",
                "wide",
                "wide_1024",
            ),
            NOTES.get("glyphs_himoe", ""),
        ),
        Sweep(
            "glyphs_dynmoe",
            "DynMoE against fixed numbers of experts",
            "glyphs",
            "control",
            ("control", "dynmoe", "dynmoe_fixed", "instance_top1", "himoe_instance", "wide"),
            NOTES.get("glyphs_dynmoe", ""),
        ),
        Sweep(
            "photos",
            "16 experts against their controls, on photos",
            "photos",
            "control",
            ("control", "x16", "wide", "himoe_x16"),
            NOTES["photos"],
        ),
        Sweep(
            "photos_more",
            "Parts once, everything free, and the scene alone, on photos",
            "photos",
            "control",
            ("control", "x16", "parts", "control_all", "himoe_scene"),
        ),
        Sweep(
            "stamps_table9",
            "Experts in the image encoder (Dynamic-DINO's Table 9)",
            "stamps",
            "control",
            ("control", "x16", "encoder"),
        ),
        Sweep(
            "himoe_table4",
            "HI-MoE: what chooses (its Table 4)",
            "stamps",
            "control",
            ("control", "token_moe", "himoe_instance", "himoe_scene", "himoe_x16"),
        ),
        Sweep(
            "himoe_table5",
            "HI-MoE: active experts (its Table 5)",
            "stamps",
            "control",
            ("control", "himoe_top1", "himoe_x16", "himoe_top4"),
        ),
        Sweep(
            "himoe_table6",
            "HI-MoE: experts (its Table 6)",
            "stamps",
            "control",
            ("control", "himoe_x4", "himoe_x8", "himoe_x16"),
        ),
        Sweep(
            "himoe_table7",
            "HI-MoE: where experts are (its Table 7)",
            "stamps",
            "control",
            ("control", "himoe_encoder", "himoe_x16", "himoe_both"),
        ),
        Sweep(
            "dynmoe",
            "DynMoE against fixed numbers of experts",
            "stamps",
            "control",
            ("control", "dynmoe", "dynmoe_max16", "dynmoe_fixed", "himoe_top1", "himoe_instance"),
        ),
    )
}

# What the tables of name_memory.py show.
MEMORY_NOTE = """
**Capacity binds here**: no FFN, half of one, or a double one change the score clearly. Routers'
rows are drawn with N(0, 1), as in Algorithm 1, where no other std is named.

- The paper's gate gains, and the more the more experts there are, as in Table 8. Drawn with 0.02 it
  gains nothing: AdamW turns small rows so fast that copies see other tokens all the time, and stay
  alike.
- **The gain is parameters**: a router that stays as it was drawn gains as much (x16-Top2 is
  0.3 ± 0.8 above it), a dense FFN of as many units 1.1 ± 1.1 more than x16-Top2.
- The gates that teach the router end lower. From small rows they gain nothing, since most tokens
  take the same part of two copies ("same part"), and the other half of the FFN is missing.
- **Learnt routing that beats the random one**: choosing each part once (`PartRouter`, ours), from
  small rows, ends 2.2 ± 1.0 above the router that stays, and level with the wide FFN, at the
  compute of the narrow one; in whole detectors it ends below both (`glyphs_std`). HI-MoE's flat
  router gains more, at twice that compute; it, too, gains more from small rows. So their default is
  0.02.
- Without the dense FFN's weights 32 points are missing (Table 10).
- **Where a router starts counts more than whether it learns** (`--search`, the second table, three
  seeds): rows that point at the k-means centres of the dense model's tokens end 3.2 ± 2.0 above
  the random router, 2.8 ± 1.8 if they never train; not clearly above the wide FFN (1.8 ± 2.2). In
  a detector it brought nothing, once, by hand. Nothing that others do to train routers helps the
  gate that teaches: ten times or a tenth of the learning rate, another temperature, z-loss, a copy
  left out each step all end below the random router, or level with it.
"""
