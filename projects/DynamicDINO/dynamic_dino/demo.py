"""`make demo`: a dense open-vocabulary detector becomes a 16-expert Dynamic-DINO, before your eyes.

Data, conversion, MoE-Tuning, evaluation of both models, pictures of real photos, curves. Every step
is a call that train_net.py, predict.py or your own code can make as well.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from .config import load_config
from .console import command, headline, program
from .data.datasets import get_metadata, load_datasets, register_builtin
from .data.images import load_image
from .data.synthetic.stamps.cli import main as make_stamps
from .data.visualization import contact_sheet, draw_detections
from .engine.evaluate import do_test, load_for_evaluation
from .engine.setup import setup
from .engine.train import do_train
from .files import configs_folder
from .serving.inference import Detector, load_detector
from .serving.shipped import DEFAULT_MODEL, EXAMPLE_PROMPT, SHIPPED_MODELS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DENSE = "nano-dense"  # trained on Stamps alone, as the experts are: so before and after compare
# Columns of the final table: names that training has seen, rare ones, and names that it hasn't.
COLUMNS = {
    "val AP50": "val/AP50",
    "val rare": "val/AP50r",
    "novel names": "val_novel/AP50_novel",
    "real photos": "val_real/AP50_seen",
    "real, novel": "val_real/AP50_novel",
}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=program(), description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder")
    parser.add_argument("--photos", type=int, default=12, help="photos in the picture")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.max_iter=50")
    args = parser.parse_args(arguments)
    run_demo(args.output, args.photos, args.overrides)


def run_demo(output: Path, photos: int, overrides: Sequence[str] = ()) -> None:
    """Runs all steps; everything that they write is in `output`."""
    start = time.monotonic()
    headline(1, 6, "The data: Stamps, photo cut-outs on photos, and real photos for the test")
    if make_stamps([]) != 0:
        raise SystemExit(1)
    register_builtin()

    headline(2, 6, "The same boxes, before and after its FFNs become 16 experts each")
    recipe = configs_folder() / "demo/nano_x16.py"
    weights = f"package:dynamic_dino/weights/{SHIPPED_MODELS[DENSE].weights}"
    own = [f"train.output_dir={_fresh(output / 'x16')}", f"train.init_checkpoint={weights}"]
    cfg = load_config(recipe, [*own, *overrides])
    setup(cfg)
    dense = load_detector(DENSE, device=cfg.train.device)
    converted = Detector(load_for_evaluation(cfg, resume=False), cfg.inference.size, dense.device)
    records = load_datasets("stamps_val_real")
    print(compare(dense, converted, [r["file_name"] for r in records[:8]], ["dog", "fish"]))

    headline(3, 6, f"MoE-Tuning for {cfg.train.max_iter} iterations (the recipe: {recipe})")
    do_train(cfg)

    headline(4, 6, "AP before and after")
    dense_cfg = load_config(configs_folder() / "pretrain/nano_stamps.py")
    dense_cfg.train.output_dir = str(output / "dense")
    dense_cfg.train.device = cfg.train.device
    Path(dense_cfg.train.output_dir).mkdir(parents=True, exist_ok=True)
    scores = {"dense": do_test(dense_cfg, dense.model)}
    scores["x16-Top2"] = json.loads((Path(cfg.train.output_dir) / "results.json").read_text())

    headline(5, 6, f"Real photos, by {DEFAULT_MODEL}, the shipped model that is used by default")
    picture = output / "real_photos.jpg"
    draw_photos(load_detector(device=cfg.train.device), records, photos, picture)
    curves = output / "curves.png"
    plot_curves(Path(cfg.train.output_dir) / "metrics.json", curves)

    table = results_table(scores)
    (output / "results.txt").write_text(table + "\n")
    headline(6, 6, f"Done in {(time.monotonic() - start) / 60:.1f} minutes")
    print(f"AP50 (percent), prompts of 30 names\n{table}\n")
    print(
        f"pictures      {picture}\ncurves        {curves}\ntable         {output / 'results.txt'}"
    )
    print(f"routing       {cfg.train.output_dir}/evaluation/*/results.txt")
    print(f"TensorBoard   tensorboard --logdir {output}")
    print(f'your photos   python projects/DynamicDINO/predict.py PHOTO --text "{EXAMPLE_PROMPT}"')


def compare(
    dense: Detector, converted: Detector, photos: Sequence[str], phrases: Sequence[str]
) -> str:
    """The largest differences between two detectors' scores and boxes on some photos."""
    a = dense(list(photos), phrases, threshold=0.0, nms=1.0)
    b = converted(list(photos), phrases, threshold=0.0, nms=1.0)
    score = max(float((x.scores - y.scores).abs().max()) for x, y in zip(a, b, strict=True))
    box = max(
        float((x.pred_boxes.tensor - y.pred_boxes.tensor).abs().max())
        for x, y in zip(a, b, strict=True)
    )
    return (
        f"{len(photos)} photos, {sum(map(len, a))} detections: largest difference of a score "
        f"{score:.1e}, of a box side {box:.1e} pixels"
    )


def draw_photos(detector: Detector, records: list[dict], count: int, path: Path) -> None:
    """A sheet of photos of val_real, each asked for what it shows and eight names that it doesn't
    show, at the detector's threshold.

    Which ones is a rule, not a choice: of each name that Stamps' training knows the first photo
    that shows nothing else, and `count` of these names, evenly spread over the set.
    """
    metadata = get_metadata("stamps_val_real")
    names, novel = metadata.thing_classes, metadata.novel
    known = [name for name, is_novel in zip(names, novel, strict=True) if not is_novel]
    first: dict[str, dict] = {}
    for record in records:
        shown = {names[a["category_id"]] for a in record["annotations"]}
        if len(shown) == 1 and shown <= {*known}:
            first.setdefault(*shown, record)
    spread = np.linspace(0, len(first) - 1, min(count, len(first))).round().astype(int)
    rng = np.random.default_rng(0)
    pictures, captions = [], []
    for name, record in [list(first.items())[i] for i in spread]:
        others = [other for other in known if other != name]
        pixels = load_image(record["file_name"])
        found = detector(pixels, [name, *rng.choice(others, 8, replace=False).tolist()])
        pictures.append(draw_detections(pixels, found))
        captions.append(name)
    Image.fromarray(contact_sheet(pictures, columns=4, captions=captions)).save(path, quality=88)


def plot_curves(metrics: Path, path: Path) -> None:
    """Loss, and per MoE layer how even the load is and how many tokens keep a sibling pair."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
    layers = sorted({k.split("/")[1] for row in rows for k in row if k.startswith("moe/")})
    panels = [("total loss", {"": "total_loss"})] + [
        (title, {layer: f"moe/{layer}/{key}" for layer in layers})
        for title, key in (
            ("entropy of the experts' load (1 = even)", "load_entropy"),
            ("tokens whose two experts are siblings", "siblings"),
        )
    ]
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for label, key in curves.items():
            points = [(row["iteration"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points, strict=True), label=label or None)
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
    axes[-1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def results_table(scores: dict[str, dict[str, float | None]]) -> str:
    """One row per model, the columns of `COLUMNS`."""
    lines = [" " * 10 + "".join(f"{name:>13}" for name in COLUMNS)]
    for model, row in scores.items():
        cells = (row.get(key) for key in COLUMNS.values())
        lines.append(
            f"{model:10}" + "".join(f"{'-' if v is None else f'{v:.1f}':>13}" for v in cells)
        )
    return "\n".join(lines)


def _fresh(folder: Path) -> Path:
    """A folder for a new run; an earlier demo's run moves aside."""
    if folder.exists():
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"moved the earlier run to {aside}")
    return folder


if __name__ == "__main__":
    main()
