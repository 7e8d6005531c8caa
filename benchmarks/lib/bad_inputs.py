"""The inputs of `benchmarks/reliability.py`: valid ones of every kind, made here, and bad ones made
of them by rules and a seed. A function a family; `FAMILIES` names them all.

Each takes a folder, how many inputs there should be, and a generator of random numbers, and returns
`Trial`s. Errors that the product raises pass; what it accepts is compared with what it should be.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import instantiate
from dynamic_dino.checkpoint.files import write_safetensors
from dynamic_dino.checkpoint.weights import load_checkpoint
from dynamic_dino.config import load_config
from dynamic_dino.data.check import check_dataset
from dynamic_dino.data.datasets import get_metadata, load_file, locate_dataset
from dynamic_dino.data.images import load_image
from dynamic_dino.data.loader import build_train_loader
from dynamic_dino.data.mapper import TrainMapper
from dynamic_dino.engine import cli
from dynamic_dino.evaluation.predictions import DatasetPredictions
from dynamic_dino.files import configs_folder
from dynamic_dino.serving.inference import Detector
from dynamic_dino.serving.labels import write_labels
from dynamic_dino.serving.prompts import as_prompt
from PIL import Image
from torch import nn

from lib.mutations import VALUES, Reading, damaged, mutants, places
from lib.trials import Trial

NAMES = ("red panda", "windmill")
SIZE = (96, 64)  # width, height
# A detector of the recipes' code at a size for thousands of runs: no weights are fetched.
SMALL = [
    "model.decoder.num_layers=1",
    "model.decoder.layer.ffn.hidden=32",
    "model.query_selection.num_queries=12",
    "model.denoising.num_queries=4",
    "model.max_detections=12",
    "model.canvas=64",
    "inference.size=64",
    "model.backbone.name=test_resnet",  # timm's
    "model.backbone.weights=null",
    "model.enhancer.in_channels=[48,192,96]",
    "model.text_encoder.weights=False",
    "model.text_encoder.config={num_hidden_layers:1,hidden_size:32,intermediate_size:32,"
    "num_attention_heads:2}",
]


# ---- annotations --------------------------------------------------------------------------------


class Layout(NamedTuple):
    """A data set in a format, of which one file is changed.

    root      what a user names
    file      the one that is changed, of a kind of `mutations.KINDS`
    optional  fields that docs/data.md lets be left out
    """

    root: Path
    file: Path
    kind: str
    optional: Sequence[str | int] = ()


BOXES = [[(0, (5, 6, 25, 36)), (1, (30, 2, 60, 44))], [(1, (40, 8, 60, 38))], []]  # x1, y1, x2, y2


def _draw(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i}.png" for i in range(len(BOXES))]
    for i, file in enumerate(files):
        noise = np.random.default_rng(i).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
    return files


def _xywh(box: Sequence[int]) -> list[int]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _coco(captions: bool) -> dict:
    images: list[dict] = []
    annotations: list[dict] = []
    for i, boxes in enumerate(BOXES):
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]})
        if captions:
            images[-1]["caption"] = "a red panda near a windmill"
        for label, box in boxes:
            annotation = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": label + 1}
            annotation |= {"bbox": _xywh(box), "area": 600, "iscrowd": 0}
            if captions:
                annotation |= {"category_id": 1, "tokens_positive": [[[2, 11]], [[19, 27]]][label]}
            annotations.append(annotation)
    categories: list[dict] = [{"id": 1, "name": NAMES[0]}, {"id": 2, "name": NAMES[1]}]
    categories[0] |= {"frequency": "r", "novel": False, "near_synonyms": [2]}
    return {"images": images, "annotations": annotations, "categories": categories}


def layouts(folder: Path) -> dict[str, Layout]:
    """The same three pictures in every format."""
    result: dict[str, Layout] = {}

    def add(
        name: str,
        file: str,
        kind: str,
        content: Any,
        optional: Sequence[str | int] = (),
    ) -> None:
        path = folder / name / file
        _draw(path.parent)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        result[name] = Layout(path, path, kind, optional)

    flags = ("iscrowd", "area", "segmentation", "frequency", "novel", "near_synonyms")
    add("COCO", "a.json", "json", _coco(captions=False), flags)
    add("MDETR", "a.json", "json", _coco(captions=True), flags)
    size = {"width": SIZE[0], "height": SIZE[1]}
    spans = {NAMES[0]: [[2, 11]], NAMES[1]: [[19, 27]]}
    grounding, detection = [], []
    for i, boxes in enumerate(BOXES[:2]):
        regions = [
            {"bbox": list(b), "phrase": NAMES[c], "tokens_positive": spans[NAMES[c]]}
            for c, b in boxes
        ]
        caption = {"caption": "a red panda near a windmill", "regions": regions}
        grounding.append(json.dumps({"filename": f"{i}.png", **size, "grounding": caption}))
        found = [{"bbox": list(b), "category": NAMES[c], "label": c} for c, b in boxes]
        line = {"filename": f"{i}.png", **size, "detection": {"instances": found}}
        detection.append(json.dumps(line))
    add("ODVG grounding", "a.jsonl", "jsonl", "\n".join(grounding), ("tokens_positive",))
    add("ODVG detection", "a.jsonl", "jsonl", "\n".join(detection), ("label",))

    tasks, shapes = [], ""
    for i, boxes in enumerate(BOXES):
        values = []
        shapes += f'<image id="{i}" name="{i}.png" width="{SIZE[0]}" height="{SIZE[1]}">'
        for c, (x1, y1, x2, y2) in boxes:
            x, y, w, h = (
                100 * v / s for v, s in zip(_xywh((x1, y1, x2, y2)), SIZE * 2, strict=True)
            )
            value = {"x": x, "y": y, "width": w, "height": h, "rotation": 0}
            value |= {"rectanglelabels": [NAMES[c]]}
            about = {"original_width": SIZE[0], "original_height": SIZE[1], "image_rotation": 0}
            values.append({**about, "type": "rectanglelabels", "value": value, "to_name": "image"})
            shapes += f'<box label="{NAMES[c]}" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}" />'
        shapes += "</image>"
        done = [{"id": i, "result": values, "was_cancelled": False, "ground_truth": False}]
        tasks.append({"id": i, "data": {"image": f"/data/upload/3/{i}.png"}, "annotations": done})
    # the address of the image stands in a field that the project names
    free = ("rotation", "image_rotation", "was_cancelled", "ground_truth", "image")
    add("Label Studio", "tasks.json", "json", tasks, free)
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    cvat = f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
    sizes = ("width", "height")  # where there is none, it is that of the file
    add("CVAT", "annotations.xml", "xml", f"{cvat}{shapes}</annotations>", sizes)
    rows = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    for i, boxes in enumerate(BOXES):
        rows += [",".join(map(str, (f"{i}.png", *SIZE, NAMES[c], *box))) for c, box in boxes]
    add("CSV", "labels.csv", "csv", "\n".join(rows) + "\n", (1, 2))  # the columns of the size

    found = [
        {
            "file": str(file),
            **size,
            "prompt": list(NAMES),
            "detections": [{"phrase": NAMES[c], "score": 0.5, "box": list(b)} for c, b in boxes],
        }
        for file, boxes in zip(_draw(folder / "pictures"), BOXES, strict=True)
    ]
    for name, kind, file, type in (
        ("VOC", "voc", "voc/Annotations/0.xml", "xml"),
        ("LabelMe", "labelme", "labelme/0.json", "json"),
        ("YOLO labels", "yolo", "yolo/labels/0.txt", "txt"),
        ("YOLO settings", "yolo", "yolo/data.yaml", "yaml"),
    ):
        home = folder / name
        home.mkdir(exist_ok=True)
        if not (home / kind).exists():
            write_labels(found, home, kind)
        root = home / (f"{kind}:train" if kind == "yolo" else kind)
        optional = ("imageWidth", "imageHeight", "val")  # without val, a part of train is drawn
        result[name] = Layout(root, home / file, type, optional)
    return result


def annotations(folder: Path, count: int, rng: random.Random) -> list[Trial]:
    """Read, checked by `data check`, and mapped to samples as in training. `check` may not fail
    itself, and has to call good what training reads."""
    formats = layouts(folder)
    shares = [count // len(formats) + (i < count % len(formats)) for i in range(len(formats))]
    return [
        trial
        for (name, layout), share in zip(formats.items(), shares, strict=True)
        for trial in _of_format(name, layout, share, rng)
    ]


def _of_format(name: str, layout: Layout, count: int, rng: random.Random) -> Iterator[Trial]:
    good = layout.file.read_bytes()

    def read(content: bytes) -> str:
        layout.file.write_bytes(content)
        return what_is_read(layout.root)

    reading = Reading(good, layout.kind, read, layout.optional)
    mentions = (str(layout.root).partition(":")[0], layout.file.name, "dataloader.train", "image ")

    def run(content: bytes) -> str:
        layout.file.write_bytes(content)
        try:
            return _checked_and_read(layout.root, reading, content)
        finally:
            layout.file.write_bytes(good)

    for what, content in mutants(good, layout.kind, count, rng):
        yield Trial(f"{name}: {what}", partial(run, content), mentions)


def _checked_and_read(root: Path, reading: Reading, content: bytes) -> str:
    try:
        result = check_dataset(str(root), images=0, tokenizer="package:none/none", max_tokens=10**7)
        kinds = {kind for kind in result.counts if kind not in result.notes}
        if "failed check" in kinds:
            raise AssertionError(f"a check failed itself: {result.examples['failed check'][0]}")
    except (ValueError, OSError):
        kinds = {"unreadable file"}
    try:
        found = what_is_read(root)
    except (ValueError, OSError) as error:
        if not kinds:
            return f"check calls it good, training refuses it: {error}"
        raise
    mapper = TrainMapper(dataset=str(root), size=32, max_phrases=4)
    loader = build_train_loader(load_file(locate_dataset(str(root))), mapper, 1)
    list(itertools.islice(loader, 2))
    if kinds - {"only crowds", "caption over the token limit"}:
        return f"check finds {', '.join(sorted(kinds))}, training accepts it"
    return reading.misreading(content, found)


def what_is_read(root: Path) -> str:
    """All that training learns of a data set, without where it lies."""
    records = load_file(locate_dataset(str(root)))
    metadata = get_metadata(str(root)).as_dict()
    places_ = ("name", "json_file", "image_root", "notes")
    about = {key: value for key, value in metadata.items() if key not in places_}
    return repr(([*records], about)).replace(str(root), "ROOT")


# ---- images -------------------------------------------------------------------------------------

CHECKED = ("PNG", "palette PNG", "16-bit PNG")  # formats with checksums
FOREIGN = {
    "empty": b"",
    "text": b"hello world",
    "HTML": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
    "XML error": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n",
    "JSON": b'{"error": "not found"}',
    "zeros": bytes(500),
    "Entry not found": b"Entry not found",
}


def images(folder: Path, count: int, rng: random.Random) -> list[Trial]:
    """What is decoded of a cut or damaged file has to be a picture, uint8 [H, W, 3]. Where it isn't
    the picture that was saved, the format must have no checksum, and the file not be cut."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    colours = Image.fromarray(noise)
    turned = Image.Exif()
    turned[274] = 6
    forms = {
        "JPEG": _saved(colours, "JPEG", exif=turned),
        "CMYK JPEG": _saved(colours.convert("CMYK"), "JPEG"),
        "PNG": _saved(colours, "PNG"),
        "palette PNG": _saved(colours.convert("P"), "PNG"),
        "16-bit PNG": _saved(Image.fromarray(noise[..., 0].astype(np.uint16) * 200), "PNG"),
        "WEBP": _saved(colours, "WEBP"),
        "GIF": _saved(colours, "GIF"),
        "TIFF": _saved(colours, "TIFF"),
        "LZW TIFF": _saved(colours, "TIFF", compression="tiff_lzw"),
        "BMP": _saved(colours, "BMP"),
        "PPM": _saved(colours, "PPM"),
    }
    file = folder / "picture.jpg"
    trials = [(name, content, None) for name, content in {**FOREIGN, **bombs()}.items()]
    for kind in ("ICO", "PCX", "EPS", "PDF", "SGI", "DDS", "IM"):  # that nothing should open
        trials.append((f"{kind} named .jpg", _saved(colours, kind), None))
    for form in itertools.cycle(forms):
        if len(trials) >= count:
            break
        what, content = damaged(forms[form], rng)
        trials.append((f"{form}: {what}", content, form))

    def run(content: bytes, form: str | None, cut: bool) -> str:
        file.write_bytes(content)
        found = load_image(file)
        if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3:
            return f"decoded to {found.dtype} {found.shape}"
        if form is None:
            return "accepted"
        file.write_bytes(forms[form])
        if (cut or form in CHECKED) and not np.array_equal(found, load_image(file)):
            return "decoded to another picture"
        return ""

    return [
        Trial(name, partial(run, content, form, ": cut" in name), (file.name,))
        for name, content, form in trials
    ]


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def bombs() -> dict[str, bytes]:
    """PNGs of few bytes that say that they are large, or hold much text."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        sums = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + sums

    def png(width: int, height: int, pixels: bytes, *extra: bytes, bits: int = 8) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
        body = [*extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + head + b"".join(body)

    little = zlib.compress(bytes(10))
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"A" * 10**8, 1))
    sizes = [(60000, 60000), (13000, 13000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (0, 5)]
    result = {f"PNG that says {w} x {h}": png(w, h, little) for w, h in sizes}
    result["PNG with 100 MB of text"] = png(4, 4, zlib.compress(bytes(13 * 4)), text)
    return result


# ---- checkpoints --------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 3)


class Runs:
    """What unpickling would call."""

    def __reduce__(self):
        return print, ("code of a checkpoint ran",)


def checkpoints(folder: Path, count: int, rng: random.Random) -> list[Trial]:
    """What loads has to be, number for number, what was saved."""
    folder.mkdir(parents=True, exist_ok=True)
    state = Small().state_dict()
    write_safetensors(state, folder / "good.safetensors")
    torch.save({"model": state, "iteration": 3}, folder / "good.pth")
    good = {suffix: (folder / f"good{suffix}").read_bytes() for suffix in (".safetensors", ".pth")}

    def load(suffix: str, content: bytes) -> str:
        path = folder / f"bad{suffix}"
        path.write_bytes(content)
        load_checkpoint(model := Small(), path)
        loaded = model.state_dict()
        wrong = [name for name in state if not torch.equal(loaded[name], state[name])]
        return f"{wrong[0]} and {len(wrong) - 1} others are not what was saved" if wrong else ""

    trials = [
        (f"{name} as {suffix}", suffix, content)
        for name, content in FOREIGN.items()
        for suffix in good
    ]
    for what, other in _other_states(state):
        torch.save(other, folder / "other.pth")
        trials.append((f".pth: {what}", ".pth", (folder / "other.pth").read_bytes()))
        with contextlib.suppress(Exception):  # safetensors can't hold everything
            write_safetensors(other, folder / "other.safetensors")
            content = (folder / "other.safetensors").read_bytes()
            trials.append((f".safetensors: {what}", ".safetensors", content))
    with zipfile.ZipFile(
        bomb := io.BytesIO(), "w", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as archive:
        archive.writestr("archive/data.pkl", bytes(3 * 10**7))
    trials.append(("zip of 30 MB of zeros", ".pth", bomb.getvalue()))
    for length in (0, 2**32, 2**63 - 1, 2**64 - 1):
        head = struct.pack("<Q", length) + good[".safetensors"][8:]
        trials.append((f"header of {length} bytes", ".safetensors", head))
    for suffix in itertools.cycle(good):
        if len(trials) >= count:
            break
        content, what = good[suffix], rng.random()
        if what < 0.6:
            at, bit = rng.randrange(len(content)), rng.randrange(8)
            bad = bytearray(content)
            bad[at] ^= 1 << bit
            trials.append((f"{suffix}: bit {bit} of byte {at}", suffix, bytes(bad)))
        else:
            name, bad_bytes = damaged(content, rng)
            trials.append((f"{suffix}: {name}", suffix, bad_bytes))
    return [
        Trial(name, partial(load, suffix, content), ("bad",)) for name, suffix, content in trials
    ]


def _other_states(state: dict) -> Iterator[tuple[str, Any]]:
    first = next(iter(state))
    weight = state[first]
    for name in ("int8", "int64", "uint8", "bool", "complex64"):
        yield f"weights of {name}", state | {first: weight.to(getattr(torch, name))}
    for value in (math.nan, math.inf, -math.inf):
        bad = weight.clone()
        bad.view(-1)[3] = value
        yield f"a weight of {value}", state | {first: bad}
    yield "a key missing", {k: v for k, v in state.items() if k != first}
    yield "a key more", state | {"more": weight}
    yield "another shape", state | {first: weight[:3]}
    yield "turned", state | {first: weight.t()[:, :5]}
    yield "another name", {("new" if k == first else k): v for k, v in state.items()}
    yield "empty", {}
    yield "a list", [weight]
    yield "a text for a tensor", state | {first: "weight"}
    yield "None for a tensor", state | {first: None}
    yield "a number", 3
    yield "numbers for keys", dict(enumerate(state.values()))
    yield "code", {"model": Runs()}
    yield "code beside weights", {"model": state, "optimizer": Runs()}
    yield "code for a tensor", state | {first: Runs()}


# ---- predictions --------------------------------------------------------------------------------


def predictions(folder: Path, count: int, rng: random.Random) -> list[Trial]:
    """COCO results for scoring."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"image_id": i % 2 + 1, "category_id": 1, "bbox": [i + 0.5, 2, 30, 4], "score": i / 10}
        for i in range(1, 4)
    ]
    file, good = folder / "predictions.json", json.dumps(rows).encode()

    def read(content: bytes) -> str:
        file.write_bytes(content)
        found = DatasetPredictions.read(file)
        found.check_ids([1, 2], [1])
        arrays = (found.image_ids, found.category_ids, found.boxes, found.scores)
        return repr([array.tolist() for array in arrays])

    reading = Reading(good, "json", read)

    def run(content: bytes) -> str:
        return reading.misreading(content, read(content))

    found = mutants(good, "json", count, rng)
    mentions = (file.name, "the predictions' entry")
    return [Trial(what, partial(run, content), mentions) for what, content in found]


# ---- prompts ------------------------------------------------------------------------------------


def prompts(folder: Path, count: int, rng: random.Random) -> list[Trial]:
    """Texts, lists, other objects, thresholds and images, given to a detector. What it finds has to
    be called as asked, lie in the image, and score what a score can be, and at least the threshold.
    """
    cfg = load_config(configs_folder() / "pretrain/nano_drawn.py", SMALL)
    torch.manual_seed(0)
    detector = Detector(instantiate(cfg.model).eval(), 64, "cpu", 0.0)
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)

    def run(image: Any, prompt: Any, **options: Any) -> str:
        if callable(prompt):  # iterators can be used once
            prompt = prompt()
        found = detector(image, prompt, **options)
        if isinstance(found, list):
            return "" if isinstance(image, list) and len(found) == len(image) else "a list"
        named = set(as_prompt(prompt).phrases) if not hasattr(prompt, "__next__") else None
        if named is not None and not {*found.phrases} <= named:
            return f"it found {found.phrases[0]!r}, which nobody asked for"
        scores, boxes = found.scores, found.pred_boxes.tensor
        height, width = found.image_size
        if len(found) and not (0 <= scores.min() and scores.max() <= 1):
            return "a score outside of 0 to 1"
        if len(found) and (scores < float(options.get("threshold", 0.0) or 0.0)).any():
            return "a score below the threshold"
        if not (boxes >= 0).all() or (boxes > torch.tensor([width, height] * 2)).any():
            return "a box outside of the image"
        most = options.get("max_detections")
        return "more than were asked for" if most is not None and len(found) > most else ""

    trials = [Trial(name, partial(run, picture, prompt)) for name, prompt in odd_prompts().items()]
    for option in ("threshold", "max_detections", "nms"):
        for value in VALUES:
            name = f"{option}={ascii(value)[:40]}"
            trials.append(Trial(name, partial(run, picture, "cow. horse.", **{option: value})))
    for name, image in odd_images(folder).items():
        trials.append(Trial(f"image: {name}", partial(run, image, "cow. horse.")))
    while len(trials) < count:
        text = "".join(_letter(rng) for _ in range(rng.choice((1, 5, 30, 300))))
        given = text if rng.random() < 0.7 else text.split(" ")
        trials.append(Trial(f"random: {ascii(given)[:40]}", partial(run, picture, given)))
    return trials


def _letter(rng: random.Random) -> str:
    ranges = ((32, 127), (0x80, 0x3000), (0x3000, 0xD800), (0xD800, 0xE000), (0xE000, 0x110000))
    special = " .,;?\n\0\u200b\u202e\u0301[]()"
    return chr(rng.randrange(*rng.choice(ranges))) if rng.random() < 0.7 else rng.choice(special)


def odd_prompts() -> dict[str, Any]:
    return {
        "empty": "",
        "dots": "...",
        "blanks": "   ",
        "no width": "\u200b",
        "picture": "🐼.",
        "500 accents": "e" + "\u0301" * 500,
        "right to left": "\u202egod",
        "half a pair": "\ud800",
        "zero": "\0",
        "two lines": "a\nb",
        "no phrases": [],
        "an empty phrase": [""],
        "None in a list": [None],
        "numbers": [1, 2],
        "a number": 5,
        "bytes": b"cat",
        "a dict": {"a": 1},
        "a tuple": ("a", "b"),
        "a set": {"a"},
        "a list in a list": [["a"]],
        "a generator": lambda: (letter for letter in "ab"),
        "an array": np.array(["a", "b"]),
        "None": None,
        "special tokens": "[CLS] [SEP] [PAD] [MASK] [UNK]",
        "HTML": "<script>alert(1)</script>",
        "thrice the same": ["cat", "cat", "Cat"],
        "300 words": " ".join(["word"] * 300),
        "600 words": " ".join(["word"] * 600),
        "a word of 5,000 letters": "x" * 5000,
        "300 names": [f"name {i}" for i in range(300)],
        "2,000 names": [f"name {i}" for i in range(2000)],
        "a phrase of 10^5 words": "a " * 10**5,
        "a word of 10^6 letters": "a" * 10**6,
        "10^6 dots": "." * 10**6,
        "10^5 brackets": "(" * 10**5,
    }


def odd_images(folder: Path) -> dict[str, Any]:
    byte = np.uint8
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "0 x 0": np.zeros((0, 0, 3), byte),
        "1 x 1": np.zeros((1, 1, 3), byte),
        "1 x 5000": np.zeros((5000, 1, 3), byte),
        "20000 x 1": np.zeros((1, 20000, 3), byte),
        "grey": np.zeros((9, 9), byte),
        "with alpha": np.zeros((9, 9, 4), byte),
        "fractions": np.zeros((9, 9, 3)),
        "NaN": np.full((9, 9, 3), np.nan),
        "channels first": np.zeros((3, 9, 9), byte),
        "objects": np.array([[["a"] * 3]]),
        "strided": np.zeros((18, 18, 6), byte)[::2, ::2, ::2],
        "a tensor": torch.zeros(3, 9, 9),
        "None": None,
        "a folder": folder,
        "missing": "missing.jpg",
        "no images": [],
        "a list of None": [None],
        "an address": "http://example.org/a.jpg",
        "/dev/null": "/dev/null",
        "/dev/zero": "/dev/zero",
        "a zero in the name": "a\0b.jpg",
    }


# ---- overrides ----------------------------------------------------------------------------------

RUN = ["train.max_iter=1", "train.eval_period=0", "train.log_period=1", "train.num_threads=1"]
# Not drawn: where results go, and what is as long, or starts as many processes, as is asked for.
LEFT = ("train.output_dir", "train.device", "train.num_threads", "dataloader.test")
LEFT += ("dataloader.train.num_workers", "train.max_iter")


def overrides(folder: Path, count: int, rng: random.Random) -> list[Trial]:
    """Fields of the recipe with other values, given to train_net.py for a run of one iteration. A
    run that ends well has to leave the checkpoint of its last iteration and a config.yaml with the
    value that was given; numbers of what there is (sizes, periods, counts) may not be negative."""
    recipe = configs_folder() / "pretrain/nano_drawn.py"
    small = [*SMALL, *RUN, "dataloader.train.total_batch_size=2"]
    cfg = load_config(recipe, small)
    fields = [
        ".".join(map(str, path))
        for path in places(json.loads(json.dumps(_plain(cfg), default=str)))
        if all(isinstance(step, str) and not step.startswith("_") for step in path)
        and path[0] in ("train", "optimizer", "dataloader", "inference", "lr_multiplier")
        and not ".".join(map(str, path)).startswith(LEFT)
    ]
    texts = ["null", "true", "0", "-1", "-5", "1.5", "1e3", "nan", "inf", "abc", "[]", "[1]"]
    texts += ["{a:1}", "''", "99999999999999999999", "1e308", "/nowhere", "${x}"]
    pairs = [(field, text) for field in fields for text in texts]
    odd = ["train.maxiter=5", "max_iter=5", "=5", "a", "a=b=c", "train..x=1", "--foo", "~train"]
    odd += ["train[0]=1", "../x=1", "+a.b=1", "optimizer._target_=os.system", "model=null"]
    few = ("dataloader.train.num_workers", "train.max_iter")
    odd += [f"{field}={n}" for field in few for n in ("-1", "1.5", "abc", "null", "[1]", "nan")]
    given = odd + [f"{f}={t}" for f, t in rng.sample(pairs, min(count, len(pairs)))]

    def run(override: str, number: int) -> str:
        out = folder / str(number)
        said = io.StringIO()
        arguments = ["--config-file", str(recipe), "--num-gpus", "0", *small]
        arguments += [f"train.output_dir={out}", override]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.main(arguments)
            except SystemExit as end:
                if end.code not in (None, 0):
                    text = said.getvalue().strip() if isinstance(end.code, int) else str(end.code)
                    raise ValueError(text.splitlines()[-1] if text else "nothing said") from None
        return _of_the_run(out, override)

    def names(override: str) -> tuple[str, ...]:
        """What a clear error names: the field, or the node that couldn't be built."""
        field = override.partition("=")[0].strip("-+~")
        return field, f"{field.rpartition('.')[0]}: ", "overrides"

    return [Trial(o, partial(run, o, i), names(o)) for i, o in enumerate(given[:count])]


def _of_the_run(out: Path, override: str) -> str:
    kept = load_config(out / "config.yaml", to_build=False)
    final = out / "model_final.pth"
    if not final.is_file():
        return "it ended well, without a checkpoint"
    iteration = torch.load(final, weights_only=True)["iteration"]
    if iteration != kept.train.max_iter - 1:
        return f"its checkpoint is of iteration {iteration}"
    field, _, text = override.partition("=")
    value = kept
    for step in field.split("."):
        value = value[step]
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    counts = ("period", "size", "num_", "max_", "window", "keep", "prefetch", "seed")
    if number is not None and number < 0 and any(part in field for part in counts):
        return f"{value} was accepted"
    return ""


def _plain(cfg: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=False)


Family = Callable[[Path, int, random.Random], list[Trial]]
# name: what makes it, and its share of all inputs
FAMILIES: dict[str, tuple[Family, float]] = {
    "annotations": (annotations, 0.64),
    "images": (images, 0.17),
    "checkpoints": (checkpoints, 0.06),
    "predictions": (predictions, 0.06),
    "prompts": (prompts, 0.045),
    "overrides": (overrides, 0.025),
}
