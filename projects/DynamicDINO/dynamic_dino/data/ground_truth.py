"""What an evaluation compares with: a data set's COCO file, or its records laid out like one."""

from __future__ import annotations

from pathlib import Path

from detectron2.data import MetadataCatalog

from ..remote import address
from .datasets import get_metadata, load_file, locate_dataset
from .records import Records


def ground_truth(dataset: str) -> Path | dict:
    """The COCO (or MDETR) file of a registered name or path; for data in another format, or a part
    drawn from a file, the content that such a file would have.

    Raises what loading the data set raises.
    """
    metadata = get_metadata(dataset)
    file = metadata.get("json_file")
    if file is not None and not metadata.get("drawn"):
        return Path(file)
    records = load_file(locate_dataset(dataset, metadata.image_root))
    return coco_dictionary(records, get_metadata(dataset))


def annotation_files(dataset: str) -> list[Path]:
    """The annotation files of a registered data set, or of a path, without reading them."""
    file = MetadataCatalog.get(dataset).get("json_file")
    if file is None or address(file):
        return locate_dataset(dataset).annotation_files
    return [Path(file)]


def categories_of(metadata) -> list[dict]:
    """A data set's classes as COCO JSON has them: with the ids of a COCO source, else from 1 on."""
    classes = metadata.thing_classes
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {
        i + 1: i for i in range(len(classes))
    }
    id_of = {i: category for category, i in ids.items()}
    return [{"id": id_of[i], "name": name} for i, name in enumerate(classes)]


def coco_dictionary(records: Records, metadata) -> dict:
    """Records as COCO JSON has them."""
    categories = categories_of(metadata)
    id_of = [category["id"] for category in categories]
    for field in ("frequency", "novel"):
        for category, value in zip(categories, metadata.get(field, ()), strict=False):
            category[field] = value
    images: list[dict] = []
    annotations: list[dict] = []
    for record, name in zip(records, records.names, strict=True):
        image = {key: record[key] for key in ("width", "height")}
        images.append({"id": record["image_id"], "file_name": name, **image})
        for a in record["annotations"]:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": id_of[a["category_id"]],
                    "bbox": a["bbox"],
                    "area": a["bbox"][2] * a["bbox"][3],
                    "iscrowd": a["iscrowd"],
                }
            )
    return {"images": images, "annotations": annotations, "categories": categories}
