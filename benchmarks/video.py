#!/usr/bin/env python
"""A video whose objects are known, tracked by predict.py: what is found and counted, and memory.

    python benchmarks/video.py --save                  # some minutes
    python benchmarks/video.py --photos 4 --frames 60 --folder output/clip

Photos of Stamps' val_real stand in two rows, and a camera pans along them, sways and zooms: the
boxes of the photos, moved along, are the truth. Which photos is a rule: of each name that Stamps'
training knows the first photo that shows nothing else, and as many of these as are asked for,
evenly spread over the set. All their names are asked for at once. The command runs as a user's
does, in a process of its own, whose peak memory is read as its lines appear. An object is there
while half of it is in the picture; metrics are those of `trackers.eval`, with boxes of one name
that overlap by half.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from detectron2.structures import BoxMode
from dynamic_dino.console import command
from dynamic_dino.data import get_metadata
from dynamic_dino.data.datasets import load_datasets
from dynamic_dino.data.images import load_image
from dynamic_dino.serving.shipped import DEFAULT_MODEL
from dynamic_dino.serving.video import VideoWriter
from lib.options import new_parser
from lib.provenance import provenance, results_folder, write_json
from PIL import Image

DATASET = "stamps_val_real"
SCRIPT = Path(__file__).parents[1] / "projects/DynamicDINO/predict.py"
HEIGHT, WIDTH, RATE = 320, 480, 25  # of the clip
ROW = 213  # the photos' height in pixels
OPTIONS = ["--threshold", "0.3", "--nms", "0.7"]  # twins of a box take turns in being a track
EARLY = 50  # the frame whose memory the last one's is compared with


class Truth:
    """Objects of the page of photos: boxes [N, 4] in its pixels, and their names."""

    def __init__(self) -> None:
        self.boxes, self.names = np.zeros((0, 4)), []

    def seen(self, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Their boxes in the clip, [N, 4], and which part of each is in the picture, for a camera
        that looks at `view`, x0, y0, x1, y1 of the page."""
        scale = np.array([WIDTH, HEIGHT]) / (view[2:] - view[:2])
        boxes = (self.boxes - np.tile(view[:2], 2)) * np.tile(scale, 2)
        inside = boxes.clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
        return inside, area(inside) / area(boxes)


def area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)


def page_of_photos(count: int) -> tuple[np.ndarray, Truth]:
    """The photos in two rows, uint8 [2 ROW, width, 3], and what is on them."""
    metadata = get_metadata(DATASET)
    novel = dict(zip(metadata.thing_classes, metadata.novel, strict=True))
    first: dict[str, dict] = {}
    for record in load_datasets(DATASET):
        shown = {metadata.thing_classes[a["category_id"]] for a in record["annotations"]}
        if len(shown) == 1 and not novel[next(iter(shown))]:
            first.setdefault(shown.pop(), record)
    spread = np.linspace(0, len(first) - 1, min(count, len(first))).round().astype(int)
    rows, truth = ([], []), Truth()
    for number, (name, record) in enumerate([list(first.items())[i] for i in spread]):
        row, top = rows[number % 2], ROW * (number % 2)
        left = sum(photo.shape[1] for photo in row)
        pixels = load_image(record["file_name"])
        scale = ROW / pixels.shape[0]
        size = (round(pixels.shape[1] * scale), ROW)
        row.append(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)))
        for annotation in record["annotations"]:
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            moved = np.array(box) * scale + [left, top, left, top]
            truth.boxes = np.concatenate([truth.boxes, moved[None]])
            truth.names.append(name)
    page = [np.concatenate(row, axis=1) for row in rows]
    width = max(row.shape[1] for row in page)
    page = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in page]
    return np.concatenate(page), truth


def views(height: int, width: int, frames: int) -> np.ndarray:
    """Where the camera looks, [frames, 4]: from left to right, swaying, zooming in and out."""
    t = np.linspace(0, 1, frames)
    zoom = 0.9 + 0.1 * np.cos(2 * np.pi * 4 * t)
    size = zoom[:, None] * [WIDTH, HEIGHT]
    x = t * (width - size[:, 0])
    y = (0.5 + 0.5 * np.sin(2 * np.pi * 3 * t)) * (height - size[:, 1])
    corner = np.stack([x, y], 1)
    return np.concatenate([corner, corner + size], 1)


def write_clip(path: Path, page: np.ndarray, cameras: np.ndarray) -> None:
    image = Image.fromarray(page)
    with VideoWriter(path, RATE) as writer:
        for i, view in enumerate(cameras):
            frame = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, tuple(view))
            writer.write(np.asarray(frame), i / RATE)


def run_predict(clip: Path, names: list[str], model: str, folder: Path) -> dict:
    """predict.py --track on the clip: seconds, and peak memory in MB by frame."""
    text = "".join(f"{name}. " for name in names)
    arguments = ["--text", text, "--model", model, "--track", *OPTIONS, "--output", str(folder)]
    lines, peaks = folder / f"{clip.stem}.jsonl", {}
    start = None
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(clip), *arguments])
    while process.poll() is None:
        time.sleep(0.05)
        done = lines.read_bytes().count(b"\n") if lines.exists() else 0
        # Once for each frame: a process that ends reads 120 MB of its libraries to take leave.
        if done and done not in peaks and (peak := peak_memory(process.pid)):
            start = start or time.perf_counter()
            peaks[done] = peak
            last = time.perf_counter()
    if process.returncode:
        raise SystemExit(f"predict.py ended with {process.returncode}")
    return {
        "frames_per_second": round((max(peaks) - min(peaks)) / (last - start), 1),
        "peak_mb": {
            str(frame): round(peaks[max(n for n in peaks if n <= frame)], 1)
            for frame in (EARLY, max(peaks))
            if min(peaks) <= frame
        },
    }


def peak_memory(pid: int) -> float:
    """In MB; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(found[0].split()[1]) / 1024 if found else 0.0


def score(frames: list[dict], truth: Truth, cameras: np.ndarray) -> dict:
    """The lines of predict.py against what was there."""
    from trackers.eval import box_iou, compute_clear_metrics, compute_identity_metrics

    objects, tracks, similarities = [], [], []
    there, found_objects, numbers, detections = set(), set(), set(), 0
    for frame, view in zip(frames, cameras, strict=True):
        boxes, part = truth.seen(view)
        found = [d for d in frame["detections"] if d["track"]]
        given = np.array([d["box"] for d in found], dtype=float).reshape(-1, 4)
        overlap = box_iou(boxes, given)
        same = [[name == d["phrase"] for d in found] for name in truth.names]
        overlap *= np.array(same, dtype=float).reshape(overlap.shape)
        whole = np.flatnonzero(part >= 0.5)
        # Who sees a thing that is half out of the picture isn't wrong.
        excused = (overlap[part < 0.5] >= 0.5).any(0) & ~(overlap[whole] >= 0.5).any(0)
        ids = np.array([d["track"] for d in found], dtype=int)[~excused]
        objects.append(whole)
        tracks.append(ids)
        similarities.append(overlap[whole][:, ~excused])
        there |= {*whole.tolist()}
        found_objects |= {*whole[(similarities[-1] >= 0.5).any(1)].tolist()}
        numbers |= {*ids.tolist()}
        detections += len(frame["detections"])
    clear = compute_clear_metrics(objects, tracks, similarities)
    identity = compute_identity_metrics(objects, tracks, similarities)
    return {
        "frames": len(frames),
        "objects": len(there),
        "objects_found": len(found_objects),
        "ids": len(numbers),
        "id_switches": int(clear["IDSW"]),
        "recall": round(100 * float(clear["CLR_Re"]), 1),
        "precision": round(100 * float(clear["CLR_Pr"]), 1),
        "MOTA": round(100 * float(clear["MOTA"]), 1),
        "IDF1": round(100 * float(identity["IDF1"]), 1),
        "detections": detections,
    }


@command
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a shipped model")
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="where the clips stay (default: nowhere)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        page, truth = page_of_photos(options.photos)
        cameras = views(*page.shape[:2], options.frames)
        clip = folder / "photos.mp4"
        write_clip(clip, page, cameras)
        names = list(dict.fromkeys(truth.names))
        ran = run_predict(clip, names, options.model, folder / "found")
        lines = (folder / "found" / "photos.jsonl").read_text().splitlines()
    found = score([json.loads(line) for line in lines], truth, cameras)
    packages = ("torch", "av", "supervision", "trackers")
    report = provenance(packages) | {
        "names": names,
        "runs": {" ".join([options.model, *OPTIONS]): found | ran},
    }
    if options.save:
        write_json(results_folder() / "video.json", report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
