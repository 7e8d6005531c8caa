"""The sweeps of ablations.py: settings, their rows, and the questions that tables of rows answer.

A `Setting` is data, a base checkpoint and a length of training that its rows share; a row is a
recipe with overrides. Rows are trained once for all sweeps that show them, among which is always
the control: the dense model, tuned for as long, on the same data in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FFN = "model.decoder.layer.ffn"
ROUTER = f"{FFN}.router"


@dataclass(frozen=True)
class Row:
    """A recipe under configs/, without ".py", and what is changed of it."""

    config: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What rows share.

    tests      names of the test sets; the first is the one that differences are taken on
    overrides  of every row; features: of its mappers' caches, "train" and "test" -> folder
    base       the row whose last weights the others start from, with its first seed; None: they
               start from what their recipes name
    """

    name: str
    title: str
    tests: tuple[str, ...]
    rows: Mapping[str, Row]
    overrides: tuple[str, ...] = ()
    features: Mapping[str, str] | None = None
    base: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A table: rows of a setting beside their control."""

    name: str
    title: str
    setting: str
    control: str
    rows: tuple[str, ...]


def tuned(*overrides: str, config: str = "moe_tuning/nano_x16_stamps") -> Row:
    return Row(config, overrides)


def softmax(experts: int, top_k: int = 2) -> tuple[str, str]:
    return (f"{FFN}.num_experts={experts}", f"{FFN}.top_k={top_k}")


FUSION, EXPERTS, HEADS = (
    "enhancer.layers.*.fusion.*",
    "*.ffn.experts.*,*.ffn.router.*",
    "*.class_head.*,*.box_head.*",
)


def parts(*patterns: str) -> str:
    """What trains, as an override."""
    return "train.trainable=[" + ",".join(f"'{p}'" for p in ",".join(patterns).split(",")) + "]"


STAMPS = Setting(
    "stamps",
    "nano on Stamps: MoE-Tuning of the shipped dense model",
    ("val", "val_novel", "val_real"),
    {
        "control": Row("moe_tuning/nano_dense_control_stamps"),
        "x16": tuned(),
        "token_moe": tuned(config="himoe/nano_token_moe_stamps"),
        "himoe_x16": tuned(config="himoe/nano_x16_stamps"),
        "dynmoe": tuned(
            "train.adaptive_experts.period=50",
            "train.adaptive_experts.window=50",
            config="dynmoe/nano_stamps",
        ),
    },
    # 10,000 images * 0.16 epochs / 8 images = 200 iterations
    overrides=("train.max_iter=200", "train.checkpointer.period=50", "train.eval_period=0"),
    features={"train": "datasets/stamps/features", "test": "datasets/stamps/features_test"},
)

SETTINGS = {setting.name: setting for setting in (STAMPS,)}

SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep(
            "routers",
            "Dynamic-DINO, HI-MoE and DynMoE against the dense control",
            "stamps",
            "control",
            ("control", "x16", "token_moe", "himoe_x16", "dynmoe"),
        ),
    )
}
