"""What stands in benchmarks/results/ as tables: RESULTS.md, and marked parts of documents.

In README, the model cards and the pages about accuracy and speed, a table stands between the lines
<!-- results: NAME --> and <!-- end of results -->, where NAME is one of `TABLES`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from lib.paired import Estimate, estimate, paired, unpaired

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"
PROJECT = BENCHMARKS.parent / "projects/DynamicDINO"
CARDS = PROJECT / "dynamic_dino/weights/README.md"
DOCUMENTS = [
    BENCHMARKS.parent / "README.md",
    CARDS,
    PROJECT / "docs/accuracy.md",
    PROJECT / "docs/speed.md",
    PROJECT / "docs/video.md",
    PROJECT / "docs/reliability.md",
    PROJECT / "docs/export.md",
]
PAGE = BENCHMARKS / "RESULTS.md"
MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.S)


def table(head: list[str], rows: list[list[str]]) -> str:
    """ "" without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def nano_stamps(report: dict) -> str:
    columns = {
        "val, seen": "val/AP50",
        "rare": "val/AP50r",
        "frequent": "val/AP50f",
        "val_novel, novel": "val_novel/AP50_novel",
        "real photos, seen": "val_real/AP50_seen",
        "real, novel": "val_real/AP50_novel",
    }
    names = {"control": "dense, tuned on (control)"}
    rows = []
    for name, run in report["runs"].items():
        iterations = f"{'' if name == 'dense' else '+ '}{run['iterations']}"
        scores = (run["scores"].get(key) for key in columns.values())
        rows.append([names.get(name, name), iterations, *map(_percent, scores)])
    return table(["model", "iterations", *columns], rows)


def finetune_public(report: dict) -> str:
    keys = "val/AP", "val/AP50"
    rows = []
    for name, run in report["runs"].items():
        killed = ", ".join(map(str, run["resumed_at"])) or "-"
        scores = [f"{run['before'][k]:.1f} -> {run['after'][k]:.1f}" for k in keys]
        rows.append([name, str(run["iterations"]), killed, *scores])
    return table(["run", "iterations", "killed, went on from", "AP", "AP50"], rows)


def few_shot(report: dict) -> str:
    """Means over seeds with 95 % intervals; differences are of the same images and order."""
    scores: dict[tuple, dict[str, dict[int, dict]]] = {}
    for run in report["runs"].values():
        case = scores.setdefault((run["set"], run["images"]), {})
        case.setdefault(run["model"], {})[run["seed"]] = run
    rows = []
    for (name, images), models in scores.items():
        for model, runs in models.items():
            cells = []
            for metric in ("AP", "AP50"):
                values = {seed: run["scores"][metric] for seed, run in runs.items()}
                before = report["before"][name][metric]
                cells.append(f"{before:.1f} -> {_mean(estimate(list(values.values())))}")
                for other in ("dense", "control") if metric == "AP" else ():
                    theirs = {s: r["scores"][metric] for s, r in models.get(other, {}).items()}
                    found = paired(values, theirs) if other != model else None
                    cells.append(_mean(found, "+") if found else "")
            run = next(iter(runs.values()))
            photos = f"all {run['photos']}" if images == "all" else str(images)
            case = [name, photos, str(run["iterations"]), model, str(len(runs))]
            ap, dense, control, ap50 = cells
            rows.append([*case, ap, ap50, dense, control])
    start = report["settings"]["start"]
    text = (
        f"From `{start}`: dense, all but the frozen towers trains; x16, MoE-Tuning; control, the "
        "dense model with the parts free that MoE-Tuning has. ± is a 95 % interval over seeds.\n\n"
    )
    head = ["set", "images", "iterations", "model", "seeds", "AP", "AP50"]
    return text + table([*head, "AP over dense", "AP over control"], rows)


def compress(report: dict) -> str:
    """Means over runs with 95 % intervals; differences to the control of the same run."""
    runs, controls = report["runs"], report["control"]
    key = next(k for k in next(iter(controls.values())) if k.endswith("/AP"))
    control = {run: scores[key] for run, scores in controls.items()}
    rows = [["control", "", _mean(estimate(list(control.values()))), "", ""]]
    for name in next(iter(runs.values())):
        found = {run: variants[name] for run, variants in runs.items()}
        values = {run: variant["scores"][key] for run, variant in found.items()}
        whole = {run: variants["as it is"]["scores"][key] for run, variants in runs.items()}
        cells = [_mean(estimate(list(values.values())))]
        for other in (control, whole):
            cells.append("" if values is other else _mean(paired(values, other), "+"))
        millions = next(iter(found.values()))["ffn_parameters"]
        rows.append([name, f"{millions:.3f}", *cells])
    return table(["copies", "FFNs, M parameters", key, "over control", "over all copies"], rows)


def language(report: dict) -> str:
    """Means over seeds with 95 % intervals; differences to the dense row of the same seed, and of
    a fixed k at test time to the trained top-any model itself."""
    seeds = report["seeds"]
    dense = {seed: run["dense"]["accuracy"] for seed, run in seeds.items()}
    work = {s: run["dense"]["curve"][-1]["gmacs"] for s, run in seeds.items()}
    titles = {"dense": "dense", "dynmoe": "DynMoE, top-any"}
    rows = []
    for name in next(iter(seeds.values())):
        found = {seed: run[name] for seed, run in seeds.items()}
        values = {seed: row["accuracy"] for seed, row in found.items()}
        layers = list(zip(*(row["routing"] for row in found.values()), strict=True))
        counts = [
            " / ".join(f"{estimate([layer[key] for layer in same]).mean:.1f}" for same in layers)
            for key in ("experts_per_token", "active_experts")
        ]
        training = estimate([row["train_experts_per_token"] for row in found.values()]).mean
        cost = estimate([row["curve"][-1]["gmacs"] / work[s] for s, row in found.items()]).mean
        rows.append(
            [
                titles.get(name, name.replace("top", "8 experts, k = ")),
                _mean(estimate(list(values.values()))),
                "" if name == "dense" else _mean(paired(values, dense), "+"),
                f"{training:.1f}",
                *(cell or "-" for cell in counts),
                f"{cost:.2f}",
            ]
        )
    head = ["FFN", "accuracy", "over dense", "experts a token, training", "test, by layer"]
    text = (
        f"Docstrings, percent; {report['texts']['training']:,} texts, "
        f"{report['texts']['test']:,} for the test; ± is a 95 % interval over seeds.\n\n"
    )
    text += table([*head, "active experts", "operations of training"], rows)
    forced = {seed: run["dynmoe"] for seed, run in seeds.items()}
    whole = {seed: row["accuracy"] for seed, row in forced.items()}
    rows = []
    for k in next(iter(forced.values()))["forced"]:
        values = {seed: row["forced"][k] for seed, row in forced.items()}
        difference = _mean(paired(values, whole), "+")
        rows.append([k, _mean(estimate(list(values.values()))), difference])
    text += "\nDynMoE's Table 3: the trained top-any model, each token with its k best experts:\n\n"
    return text + table(["k", "accuracy", "over top-any"], rows)


def domains(report: dict) -> str:
    """Means over seeds with 95 % intervals, at the point of training that scores best on the
    training domains; below the dense row, differences to it of the same seed."""
    titles = {
        "dense": "dense",
        "wide": "dense, 8 times as wide",
        "top1": "x8-Top1",
        "top2": "x16-Top2",
        "top4": "x32-Top4",
        "dynmoe": "DynMoE, top-any",
        "himoe": "HI-MoE, flat, 2 of 8",
    }
    seeds, objects = report["seeds"], report["objects"]
    scores: dict[str, dict[str, dict[str, float]]] = {}  # row, domain, seed
    rows = []
    for name in next(iter(next(iter(seeds.values())).values())):
        chosen = {
            (domain, seed): max(run[domain][name]["curve"], key=lambda p: p["validation"])
            for domain in objects
            for seed, run in seeds.items()
        }
        found = {d: {s: chosen[d, s]["accuracy"] for s in seeds} for d in objects}
        mean = {s: math.fsum(found[d][s] for d in objects) / len(objects) for s in seeds}
        scores[name] = {"average": mean, **found}
        cells = [
            _mean(estimate(list(values.values())))
            if name == "dense"
            else _mean(paired(values, scores["dense"][column]), "+")
            for column, values in scores[name].items()
        ]
        runs = [run[d][name] for run in seeds.values() for d in objects]
        dense = [run[d]["dense"] for run in seeds.values() for d in objects]
        cost = math.fsum(r["ffn_gmacs"] for r in runs) / math.fsum(r["ffn_gmacs"] for r in dense)
        taken = [p["experts_per_token"] for p in chosen.values() if "experts_per_token" in p]
        test = [f"{estimate(layer).mean:.1f}" for layer in zip(*taken, strict=True)]
        training = estimate([r["train_experts_per_token"] for r in runs]).mean
        cells += [f"{training:.1f}", " / ".join(test) or "-", f"{cost:.2f}"]
        rows.append([titles[name], *cells])
    names = {name for found in objects.values() for name in found}
    total = sum(sum(found.values()) for found in objects.values())
    text = (
        f"Objects of {len(names)} names, {total:,} in all, percent right of those of the domain "
        f"left out. Below dense: over dense. ± is a 95 % interval over {len(seeds)} seeds.\n\n"
    )
    columns = [f"{domain} ({sum(found.values())})" for domain, found in objects.items()]
    head = ["FFN", "average", *columns, "experts a token, training", "test, by layer"]
    return text + table([*head, "FFN compute of training"], rows)


def sparse_gating(report: dict) -> str:
    total = report["settings"]["experts"]
    lines = [
        [start, *(f"{row[key]:.2f}" for row in (rows[0], rows[-1]) for key in ("experts", "loss"))]
        for start, rows in report["descent"].items()
    ]
    low, high = report["thresholds"][0], report["thresholds"][-1]
    text = (
        f"A router of {total} experts trained by the loss alone. With all thresholds from "
        f"{low['threshold']} to {high['threshold']} a token takes {low['experts']:.1f} to "
        f"{high['experts']:.1f} experts, and the loss is {low['loss']:.2f} and "
        f"{high['loss']:.2f}.\n\n"
    )
    head = ["rows", "experts a token, before", "loss", "after", "loss"]
    return text + table(head, lines)


def scenes(report: dict) -> str:
    """By layer, means over runs; what all routes tell, run by run."""
    runs = list(report["runs"].values())

    def information(what: str, layers: list[dict], key: str = "information") -> str:
        return f"{sum(layer[what][key] for layer in layers) / len(layers):.3f}"

    def percent(values: list[float]) -> str:
        return ", ".join(f"{100 * value:.0f}" for value in values)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    rows = []
    for i, first in enumerate(runs[0]["trained"]["layers"]):
        trained, start = ([run[key]["layers"][i] for run in runs] for key in ("trained", "start"))
        drawn = [found["layers"][i] for run in runs for found in run["drawn"]]
        row = [first["layer"]]
        for what in ("routes", "experts"):
            row += [information(what, trained), information(what, start), information(what, drawn)]
            row.append(information(what, trained, "by_chance"))
        row.append(percent([layer["routes"]["above_random"] for layer in trained]))
        rows.append(row)
    told = {key: [run[key]["told_apart"] for run in runs] for key in ("trained", "start")}
    random = [value for run in runs for value in run["random"]["told_apart"]]
    chance = [run["trained"]["told_apart_by_chance"] for run in runs]
    text = (
        f"{len(report['settings']['sets'])} sets, {report['images']} images of each, all asked for "
        "the same names. Normalised mutual information of set and route, and of set and expert, "
        f"means over {len(runs)} run{'s' * (len(runs) > 1)}. The routes of all layers tell the "
        f"set of {percent(told['trained'])} % of the images; before training, of "
        f"{percent(told['start'])} %; those of random scene routers of {percent([mean(random)])} % "
        f"on the average, by chance {percent([mean(chance)])} %; the features that scene routers "
        f"see, of {percent([mean([run['told_by_features'] for run in runs])])} %. Of these "
        f"features' square {percent([mean([run['common_to_all'] for run in runs])])} % are the "
        "mean over all images.\n\n"
    )
    kinds = ["trained", "as it started", "drawn anew", "chance"]
    head = ["layer", *(f"{what}, {kind}" for what in ("route", "expert") for kind in kinds)]
    return text + table([*head, "route, above how many random ones, %"], rows)


def _mean(found: Estimate, sign: str = "") -> str:
    margin = "" if math.isnan(found.margin) else f" ± {found.margin:.1f}"
    return f"{found.mean:{sign}.1f}{margin}"


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{score:.1f}"


# set of configs/eval/shipped.py: what it is, and the classes that count there
ZOO_SETS = {
    "coco": ("COCO photos, all 80 names", [""]),
    "coco_present": ("COCO photos, names that are there", [""]),
    "groceries": ("groceries, all 25 names", [""]),
    "airport_debris": ("small things on tarmac, all 31 names", [""]),
    "animals25": ("animals, all 25 names", [""]),
    "val": ("Stamps val, 30 names", ["_seen"]),
    "val_novel": ("Stamps val_novel, 30 names", ["_novel"]),
    "val_real": ("Stamps val_real, 30 names", ["_seen", "_novel"]),
    "val_real_all": ("Stamps val_real, all 363 names", ["_seen", "_novel"]),
    "raccoon": ("Raccoon, one name", [""]),
}


def model_zoo(report: dict) -> str:
    columns = {
        "COCO photos, 80 names": ("coco", "AP50"),
        "names that are there": ("coco_present", "AP50"),
        "Stamps val": ("val", "AP50_seen"),
        "val_novel": ("val_novel", "AP50_novel"),
        "val_real": ("val_real", "AP50_seen"),
    }
    rows = []
    for name, model in report["models"].items():
        if not model["config"]:
            continue  # a run that isn't shipped
        parameters = (f"{model['parameters'][kind] / 1e6:.1f}M" for kind in ("active", "total"))
        rows.append(
            [
                f"`{name}`",
                f"`{model['config']}`",
                f"{model['bytes'] / 1e6:.0f} MB",
                *(_both_scores(model, *place) for place in columns.values()),
                " / ".join(parameters),
                f"{model['speed']:.2f}" if "speed" in model else "-",
            ]
        )
    head = ["model", "config", "size", *columns, "parameters, active / total", "speed"]
    return table(head, rows)


def _both_scores(model: dict, test: str, metric: str) -> str:
    """AP50, and behind it AP in brackets."""
    names = (metric, metric.replace("AP50", "AP"))
    wide, all_ious = (_percent(_zoo_score(model, test, name).get("value")) for name in names)
    return wide if all_ious == "-" else f"{wide} ({all_ious})"


def _zoo_score(model: dict, test: str, metric: str) -> dict:
    return model["tests"].get(test, {}).get("scores", {}).get(metric, {})


def _with_interval(score: dict, sign: str = "") -> str:
    if not score:
        return "-"
    return f"{score['value']:{sign}.1f} [{score['low']:{sign}.1f}, {score['high']:{sign}.1f}]"


def model_zoo_sets(report: dict) -> str:
    models = report["models"]
    text = "AP and AP50 in percent; in brackets 95 % intervals by bootstrap over images.\n\n"
    rows, differences = [], []
    compared = {name: row["differences"] for name, row in models.items() if "differences" in row}
    for test, (title, groups) in ZOO_SETS.items():
        for group in groups:
            what = f"{title}{', ' + group[1:] if len(groups) > 1 else ''}"
            for metric in ("AP", "AP50"):
                key = f"{metric}{group}"
                cells = [_with_interval(_zoo_score(model, test, key)) for model in models.values()]
                if {*cells} != {"-"}:
                    rows.append([what, metric, *cells])
                cells = [
                    _with_interval(found["tests"].get(test, {}).get(key, {}), "+")
                    for found in compared.values()
                ]
                if cells and {*cells} != {"-"}:
                    differences.append([what, metric, *cells])
    text += table(["photos and names", "", *(f"`{name}`" for name in models)], rows)
    if differences:
        head = [f"`{name}` less `{found['to']}`" for name, found in compared.items()]
        text += "\nDifferences, the same images drawn for both:\n\n"
        text += table(["photos and names", "", *head], differences)
    return text


def model_zoo_novel(report: dict) -> str:
    """Of each set with names that were held out of training, and the models scored on these."""
    models = {
        name: model
        for name, model in report["models"].items()
        if any("names" in found for found in model["tests"].values())
    }
    groups = {
        "_novel": "held-out names",
        "_near": "of them with a near-synonym among the learnt",
        "_far": "of them without",
    }
    rows = []
    for test, (title, _) in ZOO_SETS.items():
        measured = [model["tests"].get(test, {}).get("names", {}) for model in models.values()]
        if not any(measured):
            continue
        names = next(filter(None, measured)).values()
        near = sum(row["near_synonym"] for row in names)
        counts = {"_novel": len(names), "_near": near, "_far": len(names) - near}
        for group, what in groups.items():
            for metric in ("AP50", "AP"):
                cells = [
                    _over_chance(model["tests"].get(test, {}), f"{metric}{group}")
                    for model in models.values()
                ]
                rows.append([title, f"{counts[group]} {what}", metric, *cells])
        cells = [_near_less_far(found) for found in measured]
        rows.append([title, "with less without, interval over names", "AP50", *cells])
    if not rows:
        return ""
    text = (
        "In percent; in brackets the 95 % interval by bootstrap over images; then chance: the "
        "same boxes and scores, the names that a photo is asked for exchanged at random. Names are "
        "held out of Stamps' training; photos teach some of them to nano-photos "
        "([accuracy](../projects/DynamicDINO/docs/accuracy.md#photos)).\n\n"
    )
    return text + table(["photos and names", "which", "", *(f"`{name}`" for name in models)], rows)


def _over_chance(found: dict, metric: str) -> str:
    if metric not in found.get("chance", {}):
        return "-"
    return f"{_with_interval(found['scores'][metric])}; {found['chance'][metric]['value']:.1f}"


def _near_less_far(names: dict[str, dict]) -> str:
    scores = [[r["AP50"] for r in names.values() if r["near_synonym"] == n] for n in (True, False)]
    difference = unpaired(*scores)
    return _mean(difference, "+") if difference else "-"


def model_zoo_classes(report: dict) -> str:
    models = {
        name: model["tests"]["coco"]["classes"]
        for name, model in report["models"].items()
        if "coco" in model.get("tests", {})
    }
    if not models:
        return ""
    *_, last = models.values()
    rows = [
        [name, str(row["objects"]), *(f"{c[name]['AP50']:.1f}" for c in models.values())]
        for name, row in sorted(last.items(), key=lambda item: -item[1]["objects"])
        if row["objects"]
    ]
    return table(["COCO name", "boxes", *(f"`{name}`" for name in models)], rows)


def model_zoo_data(report: dict) -> str:
    """One row a data set and models that were trained on it alike."""
    models: dict[str, list[str]] = {}
    for name, model in report["models"].items():
        for dataset, row in model.get("training", {}).items():
            cells = [f"{row[k]:,}" for k in ("images", "boxes", "names")]
            line = [f"`{dataset}`", *cells, row["licence"], f"{100 * row['share']:.0f} %"]
            models.setdefault(json.dumps(line), []).append(f"`{name}`")
    rows = [[", ".join(names), *json.loads(line)] for line, names in models.items()]
    head = ["model", "trained on", "pictures", "boxes", "names", "licence", "share of the samples"]
    return table(head, rows)


def model_zoo_thresholds(report: dict) -> str:
    asked = {"coco_present": "names that are there", "coco": "all 80 names"}
    rows = [
        [
            f"`{name}`",
            f"{point['threshold']:.2f}",
            asked[test],
            *(f"{point[k]:.1f} %" for k in ("precision", "recall")),
            f"{point['per_image']:.1f}",
            f"{point['images']:.0f} %",
        ]
        for name, model in report["models"].items()
        for test in asked
        if (point := model.get("threshold", {}).get(test))
    ]
    head = ["model", "threshold", "asked for", "boxes that are right", "objects that are found"]
    return table([*head, "boxes a photo", "photos with any"], rows)


def moe_layer(report: dict) -> str:
    names = list(dict.fromkeys(n for row in report["rows"] for n in row["times"]))
    head = ["T", "experts", "dtype", "routing", "what", "pass", "dense, µs", *names[1:]]
    rows, unlike = [], False
    for row in report["rows"]:
        times = {name: t["median_us"] for name, t in row["times"].items()}
        ratios = [f"{times[n] / times['dense']:.2f}" if n in times else "" for n in names[1:]]
        for i, name in enumerate(names[1:]):
            if operations := row["times"].get(name, {}).get("operations"):
                ratios[i] += f" ({operations:.2f})"
                unlike = True
        rows.append([*_case(row), row["part"], row["pass"], f"{times['dense']:.0f}", *ratios])
    operations = "; in brackets its multiply-adds" if unlike else ""
    return f"Time over that of the dense FFN{operations}.\n\n" + table(head, rows)


def moe_phases(report: dict) -> str:
    phases = ("routing", "dispatch", "experts", "combine", "other")  # as phases.py has them
    head = ["T", "experts", "dtype", "routing", "pass", "of", *phases, "memory, MiB"]
    rows = []
    for row in report["rows"]:
        for name, found in row["times"].items() if row["part"] == "layer" else ():
            times = found.get("phases_us", {})
            whole = sum(times.values())
            # Where the profiler sees no kernels of the GPU, all times are 0.
            shares = [f"{100 * times[p] / whole:.0f} %" if whole else "" for p in phases]
            rows.append([*_case(row), row["pass"], name, *shares, f"{found['peak_mib']:.1f}"])
    return "Shares of the forward pass; the peak of memory.\n\n" + table(head, rows)


def _case(row: dict) -> list[str]:
    model = f"x{row['experts']}-Top{row['top_k']}"
    return [str(row["tokens"]), model, row["dtype"], row["routing"]]


def fps(report: dict) -> str:
    names = list(dict.fromkeys(name for row in report["rows"] for name in row["results"]))
    head = ["size", "batch", "precision", "mode", "text", *(f"{name}, FPS" for name in names)]
    rows = []
    for row in report["rows"]:
        speeds = {name: result["fps"] for name, result in row["results"].items()}
        ratios = {name: speed / speeds[names[0]] for name, speed in speeds.items()}
        cells = [f"{speeds[n]:.3g} ({ratios[n]:.2f})" if n in speeds else "" for n in names]
        size = f"{row['size'][0]} x {row['size'][1]}"
        rows.append([size, str(row["batch"]), row["precision"], row["mode"], row["text"], *cells])
    text = f"In brackets: over that of {names[0]}.\n\n" + table(head, rows)
    if many := report.get("many_names"):
        slow, fast = (many["results"][way]["fps"] for way in ("piece by piece", "in one call"))
        text += (
            f"\n{many['names']} names in {many['pieces']} chunks ({many['detector']}): in one call "
            f"{fast:.3g} images per second, {fast / slow:.2f} times as many as chunk by chunk.\n"
        )
    return text


def packing(report: dict) -> str:
    text = f"Time over that of the first column; vectors: {report['vectors']}.\n"
    for part in dict.fromkeys(row["part"] for row in report["rows"]):
        of_part = [row for row in report["rows"] if row["part"] == part]
        names = list(of_part[0]["results"])
        rows = []
        for row in of_part:
            times = [row["results"][name]["median_us"] for name in names]
            ratios = [f"{t / times[0]:.2f}" for t in times[1:]]
            rows.append([row["case"], str(row["threads"]), f"{times[0] / 1e3:.3g}", *ratios])
        text += "\n" + table([part, "threads", f"{names[0]}, ms", *names[1:]], rows)
    return text


def export(report: dict) -> str:
    """Of files that PyTorch runs there is only the speed."""
    asked = report["settings"]
    measured = {
        "mb": "{:.1f}",
        "compared": "{}",
        "missing": "{}",
        "extra": "{}",
        "scores": "{:.1e}",
        "boxes": "{:.1e}",
        "speed": "{:.2f}",
    }
    scores = [metric for metric in ("AP", "AP50") if asked["test"]]
    rows = []
    for row in report["rows"]:
        cells = [style.format(row[key]) if key in row else "" for key, style in measured.items()]
        cells += [f"{row[metric]:.2f}" for metric in scores]
        rows.append([row["model"], row["format"], row["precision"], *cells])
    head = ["model", "format", "precision", "MB", "compared", "missing", "new"]
    head += ["scores differ by", "boxes", "times as fast"]
    head += [f"{metric} on {asked['test']}" for metric in scores]
    text = f"{asked['threads']} thread(s), {asked['images']} photos.\n\n"
    return text + table(head, rows)


def export_layer(report: dict) -> str:
    """Time over the dense FFN's in the same runtime; the fastest form is bold."""
    forms = [name for name in report["rows"][0]["forms"] if name != "dense"]
    rows = []
    for row in report["rows"]:
        ratios = [row["forms"][form]["ratio"] for form in forms]
        cells = [f"**{r:.2f}**" if r == min(ratios) else f"{r:.2f}" for r in ratios]
        error = max(form["error"] for form in row["forms"].values())
        layer = [row["runtime"], str(row["tokens"]), str(row["hidden"]), str(row["experts"])]
        rows.append([*layer, *cells, f"{error:.0e}"])
    head = ["runtime", "tokens", "hidden units", "experts", *forms, "error"]
    text = f"{report['settings']['threads']} thread(s); two experts have the dense FFN's units.\n\n"
    return text + table(head, rows)


def peers(report: dict) -> str:
    rows = [
        [
            row["model"],
            f"{row['parameters'] / 1e6:.0f}M",
            row["text"],
            f"{row['fps']:.3g}",
            f"{row['ratio']:.2f}",
        ]
        for row in report["rows"]
    ]
    asked = report["settings"]
    height, width = asked["size"]
    title = f"{height} x {width}, {asked['dtype']}, ten names, {asked['threads']} thread(s)"
    if asked.get("clock") == "process":
        title += "; times are the processor's, so that nothing else that ran there is in them"
    head = ["model", "parameters", "text", "FPS", "time / edge-x16, encoded"]
    return f"{title}.\n\n" + table(head, rows)


def public_weights(report: dict) -> str:
    asked = report["settings"]
    shortest, longest = asked["size"]
    text = (
        f"{len(report['photos'])} photos, shortest edge {shortest}, longest at most {longest}, "
        f"{asked['dtype']}, {asked['threads']} threads; images per second, and how many times as "
        "many as transformers.\n\n"
    )
    rows = []
    for name, model in report["models"].items():
        same = model["comparison"]
        twins = f"{100 * same['twins'] / same['detections']:.1f} % of {same['detections']}"
        cells = {
            (row["library"], row["part"], row["text"]): (row["fps"], row["speedup"])
            for row in model["rows"]
        }
        for part in ("end to end", "forward"):
            theirs = cells["transformers", part, "encoded"][0]
            ours = [cells["ours", part, text] for text in ("encoded", "cached")]
            ours = [f"{fps:.3g} ({speedup:.2f})" for fps, speedup in ours]
            rows.append([name, part, f"{theirs:.3g}", *ours, twins])
    head = ["weights", "what", "transformers", "ours", "ours, text cached", "same detections"]
    return text + table(head, rows)


def training_step(report: dict) -> str:
    rows = [
        [
            row["candidate"],
            f"{row['trained'] / 1e6:.1f} of {row['parameters'] / 1e6:.1f}M",
            f"{row['median_ms']:.0f}",
            f"{row['speedup']:.2f}",
        ]
        for row in report["rows"]
    ]
    clock = report["settings"].get("clock", "wall")
    return table(["step", "trained", "ms" if clock == "wall" else "CPU ms", "speed-up"], rows)


def host_work(report: dict) -> str:
    asked = report["settings"]
    text = f"{asked['batch']} images of {asked['names']} names and {asked['objects']} objects.\n\n"
    rows = [
        [
            name,
            f"{row['median_ms']:.1f}",
            f"{row['low_ms']:.1f}-{row['high_ms']:.1f}",
            f"{row['fastest_ms']:.1f}",
        ]
        for name, row in report["rows"].items()
    ]
    return text + table(["a step's", "CPU ms", "quartiles", "fastest"], rows)


def profile_detector(report: dict) -> str:
    stages, asked = report["stages_ms"], report["settings"]
    height, width = asked["size"]
    text = (
        f"{height} x {width}, {asked['precision']}, {asked['backend']} back-end, text cached.\n\n"
    )
    rows = [
        [stage.replace("  ", "… "), f"{ms:.2f}", f"{100 * ms / stages['all']:.1f} %"]
        for stage, ms in stages.items()
    ]
    text += table(["stage, … of which", "ms", "share"], rows) + "\n"
    rows = [
        [f"`{name[:60]}`", f"{ms:.2f}", str(calls)]
        for name, (ms, calls) in report["operators_ms"].items()
    ]
    return text + table(["operator or kernel, by itself", "ms", "calls"], rows)


def flops(report: dict) -> str:
    models = report["models"]

    def row(title: str, unit: float, number: Callable[[dict], int]) -> list[str]:
        return [title, *(f"{number(model) / unit:.3f}" for model in models.values())]

    rows = []
    for part in next(iter(models.values()))["flops"]["stages"]:
        rows.append(row(part, 1e9, lambda m, part=part: m["flops"]["stages"][part]))
    rows.append(row("whole model", 1e9, lambda m: m["flops"]["total"]))
    for part in next(iter(models.values()))["flops"]["decoder"]:
        title = f"decoder: {part}"
        rows.append(row(title, 1e9, lambda m, part=part: m["flops"]["decoder"][part]))
    title = "decoder: one layer, without heads"
    rows.append(row(title, 1e9, lambda m: m["flops"]["decoder_layer"]))
    for kind in ("total", "active", "trainable"):
        title = f"parameters, {kind} (millions)"
        rows.append(row(title, 1e6, lambda m, kind=kind: m["parameters"][kind]))
    for title, key, unit in (
        ("parameters (millions)", "parameters", 1e6),
        ("decoder (that of one layer)", "decoder", 1e9),
        *((key, key, 1) for key in ("FPS, A100", "FPS, Orin NX")),
    ):
        values = [report["paper"].get(key, {}).get(name) for name in models]
        cells = ["" if value is None else f"{value / unit:.6g}" for value in values]
        if any(cells):
            rows.append([f"the paper, Tables 8 and 12: {title}", *cells])
    height, width = report["settings"]["size"]
    title = f"GFLOPs at {height} x {width}, a multiply-add is one"
    return table([title, *models], rows)


def serve_load(report: dict) -> str:
    """Counts of requests, and the server's memory over time; its times are those of a busy CPU."""
    counts = {
        "accepted": "accepted",
        "equal": "answered as alone",
        "close": "but for last digits",
        "refused": "bad, refused",
        "busy": "429",
        "stopping": "503",
        "not_connected": "not accepted any more",
        "wrong": "wrong",
        "lost": "lost",
        "exit_status": "exit status",
    }
    rows = []
    for name, run in report["runs"].items():
        memory = run["memory_mb"]
        tenth = max(len(memory) // 10, 1)
        parts = (memory[:tenth], memory[tenth : 2 * tenth], memory[-tenth:])
        rows.append(
            [
                name,
                f"{run['seconds']:.0f}",
                str(run["clients"]),
                *(f"{run[key]:,}" for key in counts),
                " / ".join(f"{t:.1f}" for t in run["seconds_p50_p95_p99"]),
                " / ".join(f"{max(part):,.0f}" for part in parts if part),
            ]
        )
    head = ["run", "seconds", "clients", *counts.values(), "latency p50 / 95 / 99, s"]
    return table([*head, "MB in the first / second / last tenth"], rows)


def video(report: dict) -> str:
    """What was tracked, and the command's peak memory by frame."""
    rows = []
    for name, run in report["runs"].items():
        memory = [f"{peak:,.0f} (frame {frame})" for frame, peak in run["peak_mb"].items()]
        rows.append(
            [
                f"`{name}`",
                str(run["frames"]),
                f"{run['objects_found']} of {run['objects']}",
                *(str(run[key]) for key in ("ids", "id_switches")),
                *(f"{run[key]:.1f}" for key in ("recall", "precision", "MOTA", "IDF1")),
                ", ".join(memory),
            ]
        )
    head = ["options", "frames", "objects found", "ids given", "id switches", "recall"]
    return table([*head, "precision", "MOTA", "IDF1", "peak memory, MB"], rows)


def record_memory(report: dict) -> str:
    rows = [
        [
            row["source"],
            f"{row['records']:,}",
            f"{row['boxes']:,}",
            f"{row['names']:,}",
            f"{row['file_bytes'] / 1e6:,.0f}",
            str(row["bytes_per_record"]),
            str(row["bytes_pickled"]),
            str(row["bytes_as_dict"]),
        ]
        for row in report["sources"]
    ]
    head = ["source", "records", "boxes", "names", "file, MB"]
    text = table([*head, "bytes a record", "if pickled", "if dicts"], rows)
    rows = [
        [
            str(row["workers"]),
            f"{row['main_rss_bytes'] / 1e6:,.0f}",
            f"{row['all_pss_bytes'] / 1e6:,.0f}",
            f"{max(row['worker_private_bytes'], default=0) / 1e6:.1f}",
            f"{max(row['worker_growth_bytes'], default=0) / 1e6:.1f}",
        ]
        for row in report["workers"]
    ]
    text += (
        f"\n{report['records']:,} records take {report['bytes'] / 1e6:,.0f} MB; reading them took "
        f"{report['peak_rss_bytes'] / 1e6:,.0f} MB at most, all told. A worker's own memory, and "
        f"how much it grew while {report['touched']:,} records were touched, in MB:\n\n"
    )
    head = ["workers", "main process", "all processes", "own", "growth"]
    return text + table(head, rows)


def lvis_evaluation(report: dict) -> str:
    asked = report["settings"]
    text = (
        f"{asked['images']} images of 9,300 detections, {asked['processes']} process"
        f"{'es' if asked['processes'] > 1 else ''}; LVIS's val has 19,809. Scores and predictions "
        "are the same, to the last digit, also from the shorter log alone.\n\n"
    )
    rows = []
    for row in report["rows"]:
        for name, run in (("all", row["all"]), ("what can count", row["cut"])):
            rows.append(
                [
                    row["detections"],
                    name,
                    f"{run['log_bytes'] / asked['images'] / 1e3:.0f}",
                    f"{run['lvis_val_gb']:.2f}",
                    f"{run['process_ms_per_image']:.1f}",
                    f"{row['AP']:.6f}",
                ]
            )
    head = ["detections", "the log holds", "kB an image", "LVIS val, GB", "CPU ms an image", "AP"]
    return text + table(head, rows)


def shared_photos(report: dict) -> str:
    rows = []
    for row in report["rows"]:
        times = [
            "{median_ms:,.0f} ({low_ms:,.0f}-{high_ms:,.0f})".format(**row[way])
            for way in ("each", "once")
        ]
        rows.append([row["model"], *times, f"{row['speedup']:.2f}"])
    head = ["", "a photo for each, CPU ms", "one for all, CPU ms", "speed-up"]
    count = report["settings"]["sentences"]
    return f"{count} sentences, one thread.\n\n" + table(head, rows)


def full_size_run(report: dict) -> str:
    def largest(found: dict, who: str, what: str) -> str:
        return f"{max(each[what] for each in found[who]) / 1e6:,.0f}"

    rows = [
        [
            start,
            str(found["iteration"]),
            f"{found['first_iteration_seconds']:.0f}",
            f"{found['cpu_seconds']:.0f}",
            *(
                largest(found, who, what)
                for who in ("ranks", "workers")
                for what in ("private", "pss")
            ),
        ]
        for start, found in report["starts"].items()
    ]
    count, on_disk = report["workers_of_a_rank"], report["cache_bytes"] / 1e6
    text = (
        f"{report['records']:,} records, {report['ranks']} processes of {count} workers; memory in "
        "MB of the largest, its own, and with its share of what it shares. The records take "
        f"{on_disk:,.0f} MB on the disk. Killed and gone on with, {report['equal_tensors']} of "
        f"{report['tensors']} tensors are those of the whole run.\n\n"
    )
    head = ["start", "first iteration", "seconds to its end", "CPU", "a process, own"]
    return text + table([*head, "and shared", "a worker, own", "and shared"], rows)


def expert_analysis(report: dict) -> str:
    columns = ("load entropy", "router entropy", "siblings", "effective partners")
    told = ("information of names", "with shuffled names")
    rows = []
    for dataset, found in report["datasets"].items():
        for layer, numbers in found["layers"].items():
            cells = [f"{numbers[c]:.2f}" for c in (*columns, *told)]
            rows.append([dataset, layer, *cells])
    text = table(["data set", "layer", *columns, *told], rows) + "\n"
    rows = [
        [row["layer"], f"{row['data set']}, {row['other']}", f"{row['correlation']:.3f}"]
        for row in report["stability"]
    ]
    text += table(["layer", "data sets", "correlation of co-selection"], rows)
    if drops := report.get("drop"):
        rows = [
            [d["layer"], d["dropped"], *(f"{d[k]:.1f}" for k in ("AP all", "change all"))]
            for d in drops[:4]
        ]
        text += "\nThe experts without which most is lost:\n\n"
        text += table(["layer", "without expert", "AP", "change"], rows)
    return text


# What issues were found at commit cd50e7c, by hand-written harnesses: the same kinds of faults and
# inputs, before anything was done about them. Kept for the comparison; no file has it.
RELIABILITY_BEFORE = {
    "kills": (22, 6, 0),  # kills, chains, of these equal in weights, metrics, best and results
    "faults": (32, 17),
    # tried, clean, accepted, unclear, traceback, wrong, hang, memory
    "annotations": (3162, 2401, 561, 8, 189, 2, 0, 1),
    "images": (861, 500, 360, 0, 0, 0, 0, 1),
    "checkpoints": (187, 94, 10, 31, 7, 45, 0, 0),
    "predictions": (224, 203, 21, 0, 0, 0, 0, 0),
    "prompts": (188, 65, 117, 0, 6, 0, 0, 0),
    "overrides": (52, 18, 13, 0, 21, 0, 0, 0),
}


def reliability(report: dict) -> str:
    """Kills, faults and bad inputs, beside those of the commit before all of it was mended."""
    before, rows = RELIABILITY_BEFORE, []
    if chains := report.get("kills"):
        same = [c for c in chains if not c["differs"] and not c["checkpoint_lost"]]
        kills = sum(len(chain["kills"]) for chain in chains)
        moments = Counter(kill["moment"] for chain in chains for kill in chain["kills"])
        rows.append(
            [
                "kill -9 ("
                + ", ".join(f"{name}: {count}" for name, count in sorted(moments.items()))
                + ")",
                f"{before['kills'][0]} in {before['kills'][1]} runs",
                f"{before['kills'][2]} runs",
                f"{kills} in {len(chains)} runs",
                f"{len(same)} runs",
            ]
        )
    if faults := report.get("faults"):
        good = sum(not row["otherwise"] for row in faults)
        rows.append(["other faults", *map(str, before["faults"]), str(len(faults)), str(good)])
    head = ["", "before: tried", "as they should be", "now: tried", "as they should be"]
    text = table(head, rows)
    odd = [f"- {row['fault']}: {row['otherwise']}\n" for row in faults or [] if row["otherwise"]]
    odd += [f"- kills: {c['differs'] or c['checkpoint_lost']}\n" for c in report.get("kills", [])]
    odd = [line for line in odd if line != "- kills: \n"]
    text += f"\nNot as they should be:\n\n{''.join(odd)}" if odd else ""

    columns = ("tried", "clean", "accepted", "unclear", "traceback", "wrong", "hang", "memory")
    families = [name for name in before if isinstance(report.get(name), dict)]
    rows = []
    for name in families:
        found = [report[name][column] for column in columns]
        rows += [[name, "before", *(f"{n:,}" for n in before[name])]]
        rows += [["", "now", *(f"{n:,}" for n in found)]]
    if families:
        for when in ("before", "now"):
            counts = [
                before[name] if when == "before" else [report[name][c] for c in columns]
                for name in families
            ]
            sums = [f"{sum(column):,}" for column in zip(*counts, strict=True)]
            rows.append(["all" * (when == "before"), when, *sums])
        head = ["bad inputs", "", "tried", "clean error", "rightly accepted", "unclear error"]
        text += "\n" + table([*head, "traceback", "silently wrong", "hang", "memory"], rows)
    return text


# name: title, file in results/<machine>/, and what makes a table of it
TABLES: dict[str, tuple[str, str, Callable[[dict], str]]] = {
    "model_zoo": ("The shipped models: AP50 (AP), percent", "model_zoo", model_zoo),
    "model_zoo_sets": ("The same on each set, with intervals", "model_zoo", model_zoo_sets),
    "model_zoo_novel": ("AP of held-out names, and chance", "model_zoo", model_zoo_novel),
    "model_zoo_thresholds": ("Their thresholds, on COCO photos", "model_zoo", model_zoo_thresholds),
    "model_zoo_data": ("What they were trained on", "model_zoo", model_zoo_data),
    "model_zoo_classes": ("AP50 by class, COCO photos, 80 names", "model_zoo", model_zoo_classes),
    "nano_stamps": ("AP50 of nano on Stamps, percent", "nano_stamps", nano_stamps),
    "finetune_public": (
        "A nano-size MM-Grounding-DINO, tuned from a directory of transformers, percent",
        "finetune_public",
        finetune_public,
    ),
    "few_shot": (
        "Few-shot: nano tuned on a few photos, percent",
        "few_shot",
        few_shot,
    ),
    "language": ("DynMoE in MiniLM, a language task", "language", language),
    "domains": ("Routers on domains left out, DynMoE's vision task", "domains", domains),
    "sparse_gating": (
        "DynMoE's sparse gating loss has no pull towards few experts",
        "sparse_gating",
        sparse_gating,
    ),
    "scenes": ("HI-MoE: do routes and experts know the scene?", "scenes", scenes),
    "compress": ("x16-Top2 on glyphs with fewer copies, percent", "compress", compress),
    "fps": ("Images per second of the whole model", "fps", fps),
    "width_nano": ("The same of nano, and an FFN as wide as all experts", "width_nano", fps),
    "width_edge": ("The same of Edge, and an FFN as wide as all experts", "width_edge", fps),
    "fps_tuned": ("The same, with tiles tuned on this GPU", "fps_tuned", fps),
    "profile": ("Where one forward pass spends its time", "profile_detector", profile_detector),
    "moe_layer": ("One FFN of the decoder", "moe_layer", moe_layer),
    "moe_phases": ("Phases and memory of the same", "moe_layer", moe_phases),
    "moe_routers": ("One FFN of the decoder with each paper's router", "moe_routers", moe_layer),
    "moe_routers_phases": ("Phases and memory of the same", "moe_routers", moe_phases),
    "moe_scaling": ("The same over tokens and experts", "moe_scaling", moe_layer),
    "packing": ("Weights packed for oneDNN, on a CPU", "packing", packing),
    "export": ("Exported detectors against PyTorch", "export", export),
    "export_edge": ("The same of Edge, with random weights", "export_edge", export),
    "export_layer": ("One exported MoE layer, over a dense FFN", "export_layer", export_layer),
    "training_step": ("A training step", "training_step", training_step),
    "host_work": ("A training step's work of the main process", "host_work", host_work),
    "peers": ("Other libraries' detectors", "peers", peers),
    "public_weights": (
        "Grounding DINO against transformers, same weights and photos",
        "public_weights",
        public_weights,
    ),
    "flops": ("Operations and parameters", "flops", flops),
    "expert_analysis": ("What the experts of nano x16 do", "expert_analysis", expert_analysis),
    "record_memory": ("Memory of the training records", "record_memory", record_memory),
    "lvis_evaluation": ("The log of an LVIS evaluation", "lvis_evaluation", lvis_evaluation),
    "shared_photos": (
        "Referring expressions that share a photo's features",
        "shared_photos",
        shared_photos,
    ),
    "full_size_run": ("A run on 1.56 million records", "full_size_run", full_size_run),
    "video": ("A video of known objects, tracked by predict.py, percent", "video", video),
    "serve_load": ("The server under load", "serve_load", serve_load),
    "reliability": ("Kills, faults and bad inputs", "reliability", reliability),
}


def page() -> str:
    """RESULTS.md: all tables of all machines, each with where it comes from."""
    text = (
        "# Results\n\nGenerated by `python benchmarks/results.py` from the files in `results/`; "
        "`make bench` measures\nyour machine. A CPU's absolute times mean little: look at ratios.\n"
    )
    for folder in sorted(p for p in RESULTS.iterdir() if p.is_dir()):
        text += f"\n## {folder.name}\n"
        told: set[Path] = set()  # files of which it stands there where they come from
        for name, (title, file, render) in TABLES.items():
            path = folder / f"{file}.json"
            if not path.exists():
                continue
            report = json.loads(path.read_text())
            if not (tables := render(report)):
                continue
            versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
            text += f"\n### {title}\n{tables}\n"
            if path in told:
                continue
            told.add(path)
            text += f"[`{path.name}`](results/{folder.name}/{path.name}): {report['machine']}; "
            text += f"{versions}; commit `{report['commit'][:12]}`"
            text += f"; `{report['command']}`\n" if "command" in report else "\n"
            picture = path.with_suffix(".png")
            if name == file and picture.exists():
                text += f"\n![{title}](results/{folder.name}/{picture.name})\n"
    return text


def with_tables(document: str) -> str:
    """A document, its marked parts as the files have them (of the CPU, where all are measured)."""

    def render(match: re.Match) -> str:
        _, file, table_of = TABLES[match[2]]
        report = json.loads((RESULTS / "cpu" / f"{file}.json").read_text())
        return f"{match[1]}{table_of(report)}{match[3]}"

    return MARKED.sub(render, document)


def update(check: bool = False) -> int:
    """Writes RESULTS.md and the marked tables; with `check` only says what disagrees, which makes
    the returned exit status 1."""
    wanted = {PAGE: page()} | {p: with_tables(p.read_text()) for p in DOCUMENTS}
    status = 0
    for path, text in wanted.items():
        if path.exists() and path.read_text() == text:
            continue
        if check:
            print(f"{path.name} disagrees with benchmarks/results/: run benchmarks/results.py")
            status = 1
        else:
            path.write_text(text)
            print(path)
    return status
