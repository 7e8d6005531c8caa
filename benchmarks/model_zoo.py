#!/usr/bin/env python
"""The shipped models: scores on Stamps, parameters, and speed over that of the dense one.

    python benchmarks/model_zoo.py                         # all, as a table
    python benchmarks/model_zoo.py --save                  # ... kept in benchmarks/results/
    python benchmarks/model_zoo.py dataloader.test.val.mapper.features=datasets/stamps/features

Evaluates the weights that this package ships as `train_net.py --eval-only` does, on the test sets
of their recipes, which `python -m dynamic_dino.data.synthetic.stamps` makes. Then they take turns
on one image, served as `load_detector` does, text cached.
"""

from __future__ import annotations

import hashlib
import tempfile

import torch
from detectron2.config import instantiate
from dynamic_dino import load_detector
from dynamic_dino.checkpoint.weights import load_checkpoint
from dynamic_dino.config import load_config
from dynamic_dino.engine.evaluate import do_test
from dynamic_dino.files import PACKAGE, configs_folder
from dynamic_dino.moe.parameters import count_parameters
from dynamic_dino.serving.shipped import SHIPPED_MODELS
from lib import tables as results
from lib.detectors import samples
from lib.interleaved import interleave, quartiles, timed
from lib.options import add_machine, add_output, new_parser, place_output, use_threads
from lib.provenance import provenance, write_json

WEIGHTS = PACKAGE / "weights"
PACKAGES = ("torch", "triton", "timm", "transformers", "numpy", "faster-coco-eval")


def scores(name: str, overrides: list[str], device: str) -> tuple[dict, dict]:
    """{"<test set>/<metric>": percent} of the shipped weights, and their parameter counts."""
    shipped = SHIPPED_MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*overrides, f"train.output_dir={folder}", f"train.device={device}"]
        cfg = load_config(configs_folder() / shipped.config, overrides)
        model = instantiate(cfg.model).to(device)
        load_checkpoint(model, WEIGHTS / shipped.weights)
        return do_test(cfg, model), count_parameters(model)


def main() -> None:
    parser = new_parser(__doc__)
    add_machine(parser)
    parser.add_argument("--repeats", type=int, default=30, help="rounds of the timing")
    add_output(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the recipes")
    options = parser.parse_args()
    place_output(options, "model_zoo")
    use_threads(options)
    rows = {}
    for name, shipped in SHIPPED_MODELS.items():
        found, parameters = scores(name, options.overrides, options.device)
        weights = (WEIGHTS / shipped.weights).read_bytes()
        rows[name] = {
            "config": f"configs/{shipped.config}",
            "weights": shipped.weights,
            "bytes": len(weights),
            "sha256": hashlib.sha256(weights).hexdigest(),
            "parameters": parameters,
            "scores": found,
        }
    steps = {}
    for name in SHIPPED_MODELS:
        detector = load_detector(name, device=options.device)
        batch = samples((320, 320), device=options.device)

        def step(model=detector.model, batch=batch) -> float:
            with torch.inference_mode():
                return timed(lambda: model(batch), options.device)

        step()
        steps[name] = step
    times = interleave(steps, options.repeats)
    for name, seconds in times.items():
        rows[name]["times"] = quartiles(seconds)
    report = provenance(PACKAGES, options.device) | {"models": rows}
    if options.json:
        write_json(options.json, report)
    print(results.model_zoo(report))


if __name__ == "__main__":
    main()
