#!/usr/bin/env python
"""Memory of the paper's 1.56 million training records, and what data workers add to it.

    python benchmarks/record_memory.py                   # some minutes, 3 GB of temporary files
    python benchmarks/record_memory.py --records 50000   # in half a minute

Writes annotation files of the sizes of Dynamic-DINO's Table 7, without images, in the formats that
they are published in; reads them and builds the training loader as a run does; and looks at the
memory of the process and its workers, first and after they have touched many records. With --save:
``benchmarks/results/cpu/record_memory.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from dynamic_dino.console import command
from dynamic_dino.data import build_train_loader, datasets, get_metadata, load_datasets
from dynamic_dino.data.synthetic.drawn import NAMES
from lib.provenance import provenance, results_folder, write_json

# Table 7: images and boxes, in thousands; names
SOURCES = {
    "objects365_v1_train": (609, 9621, 365),
    "v3det_train": (184, 1233, 13204),
    "gqa_train": (621, 3681, 0),
    "flickr30k_train": (149, 641, 0),
}
IMAGES = 200  # so many that are named; none is opened here
WORKERS = (0, 2, 4)
BATCH = 64


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1_563_000, help="default: %(default)s")
    parser.add_argument("--touch", type=int, default=200_000, help="records that are touched")
    parser.add_argument(
        "--files", type=Path, help="folder where the annotation files stay, to be used again"
    )
    parser.add_argument(
        "--save", action="store_true", help="write the result to benchmarks/results"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options.files or Path(folder), options.records, options.touch)
    report = provenance(("torch", "numpy")) | report
    if options.save:
        write_json(results_folder() / "record_memory.json", report)
    print(json.dumps(report, indent=1))


def measure(root: Path, count: int, touch: int) -> dict:
    # in a process of its own, whose memory is gone when it ends
    writer = multiprocessing.Process(target=write_sources, args=(root, count))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit("the annotation files couldn't be written")
    datasets.register_builtin(root)
    before = memory(os.getpid())["rss"]
    sources, rows = [], []
    for name in SOURCES:
        start = time.perf_counter()
        records = load_datasets(name)
        rows.append(
            {
                "source": name,
                "records": len(records),
                "boxes": len(records.boxes),
                "names": len(get_metadata(name).thing_classes),
                "file_bytes": datasets.locate_dataset(name, root=root).file.stat().st_size,
                "seconds": round(time.perf_counter() - start, 1),
                "bytes_per_record": round(records.nbytes / len(records)),
                **other_ways(records),
            }
        )
        sources.append(records)
    return {
        "records": sum(map(len, sources)),
        "bytes": sum(records.nbytes for records in sources),
        "rss_bytes": memory(os.getpid())["rss"] - before,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "sources": rows,
        "touched": touch,
        "workers": [with_workers(sources, workers, touch) for workers in WORKERS],
    }


def other_ways(records, sample: int = 2000) -> dict[str, int]:
    """Bytes per record as dicts, and pickled one by one as Detectron2 does."""
    chosen = range(0, len(records), max(len(records) // sample, 1))
    pickled = np.mean([len(pickle.dumps(records[i], protocol=-1)) for i in chosen])
    tracemalloc.start()
    dicts = [records[i] for i in chosen]
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {"bytes_pickled": round(pickled), "bytes_as_dict": round(size / len(dicts))}


def with_workers(sources: list, workers: int, touch: int) -> dict:
    """Memory after the first batch of every worker, and after `touch` records."""
    loader = build_train_loader(sources, touch_record, BATCH, workers, weights=[1] * len(sources))
    batches = iter(loader)
    start = time.perf_counter()
    pids = {pid for batch in itertools.islice(batches, max(4 * workers, 1)) for pid, _ in batch}
    first = {pid: memory(pid) for pid in pids}
    boxes = sum(n for batch in itertools.islice(batches, touch // BATCH) for _, n in batch)
    last = {pid: memory(pid) for pid in pids}
    seconds = time.perf_counter() - start
    main_process = memory(os.getpid())
    children = [pid for pid in pids if pid != os.getpid()]
    total = main_process["pss"] + sum(last[pid]["pss"] for pid in children)
    del batches  # ends the workers
    return {
        "workers": workers,
        "boxes": boxes,
        "records_per_second": round(touch / seconds),
        "main_rss_bytes": main_process["rss"],
        "all_pss_bytes": total,
        "worker_private_bytes": [last[pid]["private"] for pid in children],
        "worker_growth_bytes": [last[pid]["private"] - first[pid]["private"] for pid in children],
    }


def touch_record(record: dict, rng: np.random.Generator) -> tuple[int, int]:
    return os.getpid(), sum(annotation["bbox"][2] > 0 for annotation in record["annotations"])


def memory(pid: int) -> dict[str, int]:
    """Bytes: resident, proportional (shared pages divided among who shares them), private."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value, _ = line.split()
        fields[key.rstrip(":")] = int(value) * 1024
    return {
        "rss": fields["Rss"],
        "pss": fields["Pss"],
        "private": fields["Private_Clean"] + fields["Private_Dirty"],
    }


# ---- annotation files ---------------------------------------------------------------------------


def write_sources(root: Path, count: int) -> None:
    done = root / f"{count}_records"
    if done.exists():
        return
    everything = sum(images for images, _, _ in SOURCES.values())
    for number, (name, (images, boxes, names)) in enumerate(SOURCES.items()):
        rng = np.random.default_rng(number)
        part = max(round(count * images / everything), 1)
        per_image = 1 + rng.poisson(boxes / images - 1, size=part)
        file = datasets.locate_dataset(name, root=root).file
        file.parent.mkdir(parents=True, exist_ok=True)
        write = write_detection if names else write_grounding
        with file.open("w") as out:
            write(out, name, per_image, names, rng)
    done.touch()


def image_name(name: str, number: int) -> str:
    """A file name as long as those of the data set are."""
    names = SOURCES[name][2]
    return f"{name[:8]}_train_{number:012d}.jpg" if names else f"{number + 2370799}.jpg"


def write_detection(out, name: str, per_image: np.ndarray, names: int, rng) -> None:
    categories = [{"id": i + 1, "name": f"{NAMES[i % 12]} {i}"} for i in range(names)]
    out.write(f'{{"categories": {json.dumps(categories)}, "images": [')
    for i in range(len(per_image)):
        out.write(
            f'{", " if i else ""}{{"width": 640, "height": 480, '
            f'"file_name": "{image_name(name, i % IMAGES)}", "id": {i}}}'
        )
    out.write('], "annotations": [')
    number = 0
    for i, boxes in enumerate(random_boxes(per_image, rng)):
        for (x, y, w, h), category in zip(
            boxes, rng.integers(1, names + 1, len(boxes)), strict=True
        ):
            out.write(
                f'{", " if number else ""}{{"category_id": {category}, '
                f'"bbox": [{x}, {y}, {w}, {h}], "iscrowd": 0, "area": {w * h:.3f}, '
                f'"image_id": {i}, "id": {number}}}'
            )
            number += 1
    out.write("]}")


def write_grounding(out, name: str, per_image: np.ndarray, names: int, rng) -> None:
    words = [NAMES[k] for k in rng.integers(0, len(NAMES), 4096)]
    spans: list[list] = []
    out.write('{"images": [')
    for i, count in enumerate(per_image):
        caption, of_image = "There is", []
        for k in range(min(count, 6)):
            word = words[(7 * i + k) % len(words)]
            caption += " and a " if k else " a "
            of_image.append([len(caption), len(caption) + len(word)])
            caption += word
        spans.append(of_image)
        out.write(
            f'{", " if i else ""}{{"file_name": "{image_name(name, i % IMAGES)}", '
            f'"height": 480, "width": 640, '
            f'"id": {i}, "caption": "{caption}.", "dataset_name": "{name}", '
            f'"tokens_negative": [[0, {len(caption)}]]}}'
        )
    out.write('], "annotations": [')
    number = 0
    for i, boxes in enumerate(random_boxes(per_image, rng)):
        for k, (x, y, w, h) in enumerate(boxes):
            out.write(
                f'{", " if number else ""}{{"area": {w * h:.3f}, "iscrowd": 0, "image_id": {i}, '
                f'"category_id": 1, "id": {number}, "bbox": [{x}, {y}, {w}, {h}], '
                f'"tokens_positive": [{spans[i][k % len(spans[i])]}]}}'
            )
            number += 1
    out.write("]}")


def random_boxes(per_image: np.ndarray, rng):
    """Lists of [x, y, w, h] within 640 x 480 pixels, image after image."""
    for start in range(0, len(per_image), 10_000):
        counts = per_image[start : start + 10_000]
        size = rng.uniform(5, 240, (counts.sum(), 2))
        corner = rng.uniform(0, 1, size.shape) * ([640, 480] - size)
        boxes = np.concatenate([corner, size], axis=1).round(2)
        yield from (part.tolist() for part in np.split(boxes, np.cumsum(counts)[:-1]))


if __name__ == "__main__":
    main()
