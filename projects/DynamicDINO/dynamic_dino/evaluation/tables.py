"""Evaluation results as text."""

from __future__ import annotations

from tabulate import tabulate

from .protocols import protocol_named

_SIZES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_GROUPS = {"r": "rare", "c": "common", "f": "frequent", "_seen": "seen", "_novel": "novel"}


def format_results(results: dict, max_classes: int | None = None) -> str:
    """What `DetectionEvaluator` found, as tables for people.

    Args:
        results: the content of results.json.
        max_classes: show this many classes at most, half of them the best, half the worst.
    """
    metrics, per_class = results["metrics"], results["per_class"]
    scored = [row for row in per_class if row["objects"]]
    known = (*_SIZES, "AR", f"AR{results['max_dets']}")
    columns = [k for k in metrics if k in known or "@" in k] or list(metrics)
    counted = protocol_named(results["protocol"]).counted.format(results["max_dets"])
    objects = f"{results['objects']} objects of {len(scored)} classes" if per_class else ""
    images = f"{results['images']} {'images' if per_class else 'expressions'}"
    parts = [
        f"{results['dataset']}: {', '.join(filter(None, [images, objects]))}; percent, {counted}"
        + _source(results),
        _table([[_number(metrics[k]) for k in columns]], columns),
    ]
    if points := results.get("operating_points"):
        parts.append(_operating_table(points))
    for key, title in (
        ("intervals", "95 % intervals by bootstrap over images"),
        ("differences", "Differences to the other predictions, the same images drawn for both"),
    ):
        if found := results.get(key):
            parts.append(f"{title}\n{_interval_table(found)}")
    groups = {s: name for s, name in _GROUPS.items() if f"AP{s}" in metrics}
    if groups:
        rows = [
            [
                name,
                _members(scored, suffix),
                *(_number(metrics[f"{k}{suffix}"]) for k in _SIZES[:2]),
            ]
            for suffix, name in groups.items()
        ]
        parts.append(_table(rows, ["classes", "number", "AP", "AP50"]))
    if results["routing"]:
        parts.append(_routing_table(results["routing"]))
    if per_class:
        parts.append(_class_table(scored, max_classes))
    return "\n\n".join(parts)


def _source(results: dict) -> str:
    """What is scored, "" where that isn't known."""
    if not results.get("weights"):
        return ""
    iteration = results.get("iteration")
    return f"; {results['weights']}" + ("" if iteration is None else f", iteration {iteration}")


def _routing_table(layers: list[dict]) -> str:
    """One row per MoE layer; shares of tokens and loads in percent."""
    rows = [
        [
            i,
            len(layer["load"]),
            layer["active_experts"],
            f"{layer['experts_per_token']:.2f}",
            f"{layer['load_entropy']:.3f}",
            _number(100 * min(layer["load"])),
            _number(100 * max(layer["load"])),
            layer["rare_experts"],
            layer["dead_experts"],
            _number(100 * layer["siblings"]),
            _number(100 * layer["same_part"]),
        ]
        for i, layer in enumerate(layers)
    ]
    headers = "layer,experts,active,per token,load entropy,min load,max load,under 1%,dead"
    return "Routing\n" + _table(rows, [*headers.split(","), "siblings", "same part twice"])


def _operating_table(points: dict) -> str:
    """One row for each threshold that was asked for, and one for that of the best F1."""
    rows = [("asked for", row) for row in points["at"]]
    rows += [("best F1", points["best"])] if points["best"] else []
    cells = [
        [
            name,
            f"{row['threshold']:.3f}",
            *(_number(row[k]) for k in ("precision", "recall", "f1")),
            row["boxes"],
            f"{row['per_image']:.2f}",
            _number(row["images"]),
        ]
        for name, row in rows
    ]
    headers = ["", "threshold", "precision", "recall", "F1", "boxes", "an image", "images with any"]
    return "Boxes from a score on, all classes together, IoU 0.5\n" + _table(cells, headers)


def _interval_table(found: dict) -> str:
    rows = [
        [metric, *(f"{row[key]:.1f}" for key in ("value", "low", "high"))]
        for metric, row in found.items()
    ]
    return _table(rows, ["", "percent", "from", "to"])


def _class_table(scored: list[dict], max_classes: int | None) -> str:
    """The best classes first, several columns side by side."""
    rows = sorted(scored, key=lambda row: -row["AP"])
    title = f"AP of each of the {len(rows)} classes with objects, best first"
    if max_classes and len(rows) > max_classes:
        half = max_classes // 2
        title = f"AP of the {half} best and the {half} worst of {len(rows)} classes"
        rows = rows[:half] + rows[-half:]
    cells = [
        [row["name"] + _marks(row), row["objects"], _number(row["AP"]), _number(row["AP50"])]
        for row in rows
    ]
    columns = 3 if len(cells) > 20 else 1
    height = -(-len(cells) // columns)
    cells += [[""] * 4] * (columns * height - len(cells))
    lines = [sum((cells[c * height + i] for c in range(columns)), []) for i in range(height)]
    return f"{title}\n" + _table(lines, ["class", "objects", "AP", "AP50"] * columns)


def _marks(row: dict) -> str:
    marks = [row["frequency"]] if row.get("frequency") else []
    marks += ["novel"] if row.get("novel") else []
    return f" ({', '.join(marks)})" if marks else ""


def _members(scored: list[dict], suffix: str) -> int:
    if suffix.startswith("_"):
        return sum(row.get("novel") == (suffix == "_novel") for row in scored)
    return sum(row.get("frequency") == suffix for row in scored)


def _table(rows: list[list], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, stralign="right")


def _number(value: float) -> str:
    return "-" if value < 0 else f"{value:.1f}"
