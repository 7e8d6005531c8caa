"""Tiny data sets as annotation tools write them, fields that nothing reads included.

Every writer takes a folder and the same `Photo`s, draws them there and returns the path that a user
would name.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from PIL import Image

NAMES = ("red panda", "traffic light", "windmill")
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels


@dataclass
class Photo:
    name: str
    width: int
    height: int
    boxes: list[tuple[str, Box]] = field(default_factory=list)

    @property
    def stem(self) -> str:
        return Path(self.name).stem


def photos(rng: np.random.Generator, count: int = 4, first: int = 0) -> list[Photo]:
    """With boxes at whole pixels; the last one is empty, the first has every name."""
    result = []
    for i in range(count):
        w, h = (int(v) for v in rng.integers(30, 90, 2))
        boxes = []
        for k in range(0 if i == count - 1 else int(rng.integers(1, 4)) + 3 * (i == 0)):
            x1, y1 = int(rng.integers(0, w - 4)), int(rng.integers(0, h - 4))
            x2, y2 = int(rng.integers(x1 + 2, w + 1)), int(rng.integers(y1 + 2, h + 1))
            boxes.append((NAMES[k % 3], (x1, y1, x2, y2)))
        result.append(Photo(f"photo {first + i}.jpg", w, h, boxes))
    return result


def draw(folder: Path, photos: Sequence[Photo]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for photo in photos:
        Image.new("RGB", (photo.width, photo.height), "gray").save(folder / photo.name)


def truth(photos: Sequence[Photo]) -> dict[str, list[tuple[str, Box]]]:
    """File name -> boxes as `found` gives them."""
    return {p.name: sorted((n, tuple(map(float, b))) for n, b in p.boxes) for p in photos}


def found(records, names: Sequence[str]) -> dict[str, list[tuple[str, Box]]]:
    result = {}
    for record in records:
        assert Path(record["file_name"]).is_file()
        boxes = []
        for a in record["annotations"]:
            x, y, w, h = a["bbox"]
            box = tuple(round(v, 2) for v in (x, y, x + w, y + h))
            boxes.append((names[a["category_id"]], box))
        result[Path(record["file_name"]).name] = sorted(boxes)
    return result


def voc_xml(photo: Photo, from_one: int = 1) -> str:
    """labelImg's fields; `from_one` 0: corners as CVAT writes them, from 0."""
    objects = "".join(
        f"""
    <object>
        <name>{escape(name)}</name>
        <pose>Unspecified</pose>
        <truncated>0</truncated>
        <difficult>0</difficult>
        <bndbox>
            <xmin>{x1 + from_one}</xmin>
            <ymin>{y1 + from_one}</ymin>
            <xmax>{x2}</xmax>
            <ymax>{y2}</ymax>
        </bndbox>
    </object>"""
        for name, (x1, y1, x2, y2) in photo.boxes
    )
    return f"""<annotation>
    <folder>images</folder>
    <filename>{escape(photo.name)}</filename>
    <path>C:\\Users\\me\\images\\{escape(photo.name)}</path>
    <source><database>Unknown</database></source>
    <size><width>{photo.width}</width><height>{photo.height}</height><depth>3</depth></size>
    <segmented>0</segmented>{objects}
</annotation>
"""


def write_voc(root: Path, photos: Sequence[Photo], from_one: int = 1) -> Path:
    """VOC's own folders."""
    draw(root / "JPEGImages", photos)
    (root / "Annotations").mkdir(parents=True)
    for photo in photos:
        (root / f"Annotations/{photo.stem}.xml").write_text(voc_xml(photo, from_one))
    return root


def write_labelimg(root: Path, photos: Sequence[Photo]) -> Path:
    """XML files beside the images."""
    draw(root, photos)
    for photo in photos:
        (root / f"{photo.stem}.xml").write_text(voc_xml(photo))
    return root


def yolo_lines(photo: Photo, names: Sequence[str] = NAMES, polygons: bool = False) -> str:
    lines = []
    for name, (x1, y1, x2, y2) in photo.boxes:
        w, h = photo.width, photo.height
        if polygons:
            middle = ((x1 + x2) / 2, y2)
            points = [(x1, (y1 + y2) / 2), ((x1 + x2) / 2, y1), (x2, (y1 + y2) / 2), middle]
            values = [v for x, y in points for v in (x / w, y / h)]
        else:
            values = [(x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h]
        lines.append(f"{names.index(name)} " + " ".join(f"{v:.6f}" for v in values))
    return "\n".join(lines)


def write_yolo_labels(folder: Path, photos: Sequence[Photo], polygons: bool = False) -> None:
    """Ultralytics: an image without objects may have no label file."""
    folder.mkdir(parents=True, exist_ok=True)
    for photo in photos:
        if photo.boxes:
            (folder / f"{photo.stem}.txt").write_text(yolo_lines(photo, polygons=polygons))


def write_ultralytics(root: Path, photos: Sequence[Photo], polygons: bool = False) -> Path:
    draw(root / "images/train", photos)
    write_yolo_labels(root / "labels/train", photos, polygons)
    names = "\n".join(f"  {i}: {name}" for i, name in enumerate(NAMES))
    yaml = f"# comment\npath: {root}\ntrain: images/train\nval:\ntest:\n\nnames:\n{names}\n"
    (root / "data.yaml").write_text(yaml)
    return root


def write_yolo_segments(root: Path, photos: Sequence[Photo]) -> Path:
    return write_ultralytics(root, photos, polygons=True)


def write_labelimg_yolo(root: Path, photos: Sequence[Photo]) -> Path:
    """Images, labels and classes.txt in one folder."""
    draw(root, photos)
    for photo in photos:
        (root / f"{photo.stem}.txt").write_text(yolo_lines(photo))
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


def write_cvat_yolo(root: Path, photos: Sequence[Photo]) -> Path:
    """CVAT's YOLO 1.1: Darknet's files."""
    draw(root / "obj_train_data", photos)
    for photo in photos:
        (root / f"obj_train_data/{photo.stem}.txt").write_text(yolo_lines(photo))
    (root / "obj.names").write_text("\n".join(NAMES))
    (root / "obj.data").write_text("classes = 3\ntrain = data/train.txt\nnames = data/obj.names\n")
    (root / "train.txt").write_text("\n".join(f"data/obj_train_data/{p.name}" for p in photos))
    return root


def labelme_shape(name: str, points: Sequence, kind: str = "rectangle") -> dict:
    return {
        "label": name,
        "points": [list(point) for point in points],
        "group_id": None,
        "description": "",
        "shape_type": kind,
        "flags": {},
        "mask": None,
    }


def write_labelme(root: Path, photos: Sequence[Photo]) -> Path:
    """JSON beside the images, with the image in it; corners in the order in which they were drawn,
    every second shape a polygon."""
    draw(root, photos)
    for photo in photos:
        shapes = []
        for i, (name, (x1, y1, x2, y2)) in enumerate(photo.boxes):
            if i % 2:
                corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
                shapes.append(labelme_shape(name, corners, "polygon"))
            else:
                shapes.append(labelme_shape(name, [(x2, y1), (x1, y2)]))
        content = {
            "version": "5.4.1",
            "flags": {},
            "shapes": shapes,
            "imagePath": photo.name,
            "imageData": "aGVsbG8=",
            "imageHeight": photo.height,
            "imageWidth": photo.width,
        }
        (root / f"{photo.stem}.json").write_text(json.dumps(content, indent=2))
    return root


def cvat_image(number: int, photo: Photo, shapes: str | None = None) -> str:
    if shapes is None:
        shapes = "".join(
            f'<box label={quoteattr(name)} source="manual" occluded="0" xtl="{x1:.2f}" '
            f'ytl="{y1:.2f}" xbr="{x2:.2f}" ybr="{y2:.2f}" z_order="0"></box>'
            for name, (x1, y1, x2, y2) in photo.boxes
        )
    size = f'width="{photo.width}" height="{photo.height}"'
    return f"<image id='{number}' name={quoteattr(photo.name)} {size}>{shapes}</image>"


def cvat_xml(images: str) -> str:
    labels = "".join(
        f"<label><name>{escape(name)}</name><color>#fa3253</color><type>any</type>"
        "<attributes></attributes></label>"
        for name in NAMES
    )
    return f"""<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task><id>7</id><name>mine</name><mode>annotation</mode><labels>{labels}</labels></task>
    <dumped>2024-01-01 00:00:00.000000+00:00</dumped>
  </meta>
  {images}
</annotations>
"""


def write_cvat(root: Path, photos: Sequence[Photo]) -> Path:
    draw(root / "images", photos)
    images = "\n  ".join(cvat_image(i, photo) for i, photo in enumerate(photos))
    (root / "annotations.xml").write_text(cvat_xml(images))
    return root / "annotations.xml"


def label_studio_value(photo: Photo, box: Box) -> dict:
    x1, y1, x2, y2 = box
    w, h = photo.width / 100, photo.height / 100
    return {
        "x": x1 / w,
        "y": y1 / h,
        "width": (x2 - x1) / w,
        "height": (y2 - y1) / h,
        "rotation": 0,
    }


def label_studio_task(number: int, photo: Photo) -> dict:
    result = [
        {
            "original_width": photo.width,
            "original_height": photo.height,
            "image_rotation": 0,
            "value": label_studio_value(photo, box) | {"rectanglelabels": [name]},
            "id": f"r{i}",
            "from_name": "label",
            "to_name": "image",
            "type": "rectanglelabels",
            "origin": "manual",
        }
        for i, (name, box) in enumerate(photo.boxes)
    ]
    annotation = {
        "id": number,
        "completed_by": 1,
        "result": result,
        "was_cancelled": False,
        "ground_truth": False,
        "lead_time": 3.2,
        "task": number,
    }
    address = f"/data/upload/3/0a1b2c3d-{photo.name.replace(' ', '_')}"
    return {
        "id": number,
        "annotations": [annotation],
        "file_upload": address.rsplit("/", 1)[-1],
        "drafts": [],
        "predictions": [],
        "data": {"image": address},
        "meta": {},
        "project": 3,
    }


def _as_uploaded(photos: Sequence[Photo]) -> list[Photo]:
    """Label Studio writes underscores for spaces."""
    return [Photo(p.name.replace(" ", "_"), p.width, p.height, p.boxes) for p in photos]


def write_label_studio(root: Path, photos: Sequence[Photo]) -> Path:
    draw(root, _as_uploaded(photos))
    tasks = [label_studio_task(i + 1, photo) for i, photo in enumerate(photos)]
    (root / "project-3-at-2024-01-01.json").write_text(json.dumps(tasks))
    return root


def write_label_studio_min(root: Path, photos: Sequence[Photo]) -> Path:
    draw(root, _as_uploaded(photos))
    tasks = []
    for i, photo in enumerate(photos):
        labels = [
            label_studio_value(photo, box)
            | {
                "rectanglelabels": [name],
                "original_width": photo.width,
                "original_height": photo.height,
            }
            for name, box in photo.boxes
        ]
        task = {
            "image": f"/data/upload/3/0a1b2c3d-{photo.name.replace(' ', '_')}",
            "id": i,
            "annotator": 1,
            "annotation_id": i,
            "created_at": "2024-01-01T00:00:00Z",
            "lead_time": 3.2,
        }
        tasks.append(task | ({"label": labels} if labels else {}))
    (root / "project-3.json").write_text(json.dumps(tasks))
    return root


def roboflow_coco(photos: Sequence[Photo]) -> dict:
    """With the group that every export begins with."""
    categories = [{"id": 0, "name": "things", "supercategory": "none"}]
    for i, name in enumerate(NAMES, start=1):
        categories.append({"id": i, "name": name, "supercategory": "things"})
    images, annotations = [], []
    for i, photo in enumerate(photos):
        size = {"height": photo.height, "width": photo.width}
        image = {"id": i, "license": 1, "file_name": photo.name, **size}
        images.append(image | {"date_captured": "2024-01-01T00:00:00+00:00"})
        for name, (x1, y1, x2, y2) in photo.boxes:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": NAMES.index(name) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "segmentation": [],
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"year": "2024", "contributor": "", "description": "Exported from roboflow.com"},
        "licenses": [{"id": 1, "url": "", "name": "CC BY 4.0"}],
        "categories": categories,
        "images": images,
        "annotations": annotations,
    }


def write_roboflow(root: Path, photos: Sequence[Photo]) -> Path:
    draw(root / "train", photos)
    (root / "train/_annotations.coco.json").write_text(json.dumps(roboflow_coco(photos)))
    (root / "README.roboflow.txt").write_text("things - v1\n==============\n")
    return root


def write_rows(path: Path, rows: Sequence[Sequence], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def write_csv(root: Path, photos: Sequence[Photo]) -> Path:
    """TensorFlow's tutorials; an image without objects has no row, so it isn't there."""
    draw(root, [photo for photo in photos if photo.boxes])
    rows = [["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"]]
    for p in photos:
        rows += [[p.name, p.width, p.height, name, *box] for name, box in p.boxes]
    return write_rows(root / "labels.csv", rows)


def write_retinanet(root: Path, photos: Sequence[Photo]) -> Path:
    draw(root / "photos", photos)
    rows = []
    for p in photos:
        rows += [[f"photos/{p.name}", *box, name] for name, box in p.boxes]
        rows += [] if p.boxes else [[f"photos/{p.name}", "", "", "", "", ""]]
    write_rows(root / "classes.csv", [[name, i] for i, name in enumerate(NAMES)])
    return write_rows(root / "annotations.csv", rows)


WRITERS = {
    "voc": write_voc,
    "labelimg": write_labelimg,
    "ultralytics": write_ultralytics,
    "yolo segments": write_yolo_segments,
    "labelimg yolo": write_labelimg_yolo,
    "cvat yolo": write_cvat_yolo,
    "labelme": write_labelme,
    "cvat": write_cvat,
    "label studio": write_label_studio,
    "label studio min": write_label_studio_min,
    "roboflow": write_roboflow,
    "csv": write_csv,
    "retinanet": write_retinanet,
}
