"""predict.py's predictions.json as predictions of a data set: images by file, classes by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from ..data.whereabouts import common_end


def is_of_files(entry: Any) -> bool:
    """Whether an entry of a list of predictions is predict.py's, of an image, and not of a box."""
    return isinstance(entry, dict) and {"file", "detections"} <= entry.keys()


def of_dataset(entries: Iterable[dict], truth: dict, where: str) -> Iterator[dict]:
    """The detections as entries of a COCO results file.

    truth  a data set as COCO JSON has it
    where  begins the messages

    Raises ValueError for an image that the data set doesn't have, of several that may be meant, of
    another size; for a phrase that isn't one of its classes; for a malformed entry.
    """
    images = _Names(truth["images"])
    classes = {c["name"]: c["id"] for c in reversed(truth["categories"])}
    for i, entry in enumerate(entries):
        at = f"{where}: entry {i}"
        try:
            image = images.find(entry["file"])
            size, true = (
                (entry["width"], entry["height"]),
                (image.get("width"), image.get("height")),
            )
            if None not in true and size != true:
                raise ValueError(
                    f"{entry['file']} has {size[0]} x {size[1]} pixels, the data set's "
                    f"{true[0]} x {true[1]}: detect in the data set's own images"
                )
            for found in entry["detections"]:
                x0, y0, x1, y1 = found["box"]
                if found["phrase"] not in classes:
                    raise ValueError(
                        f"{found['phrase']!r} is none of the data set's names: ask for these in "
                        f"their own words ({', '.join(list(classes)[:5])}, ...)"
                    )
                yield {
                    "image_id": image["id"],
                    "category_id": classes[found["phrase"]],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": found["score"],
                }
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{at} needs file, width, height and detections with phrase, score and box: "
                f"{error!r}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from None


class _Names:
    """Images by as much of the end of a path as the path that is looked for has in common."""

    def __init__(self, images: list[dict]) -> None:
        self.by_name: dict[str, list[dict]] = {}
        for image in images:
            self.by_name.setdefault(_parts(image["file_name"])[-1], []).append(image)

    def find(self, file: str) -> dict:
        parts = _parts(file)
        candidates = self.by_name.get(parts[-1], [])
        common = [common_end(parts, _parts(image["file_name"])) for image in candidates]
        best = [image for image, n in zip(candidates, common, strict=True) if n == max(common)]
        if not best:
            raise ValueError(f"the data set has no image named {parts[-1]}: is it another one?")
        if len({image["id"] for image in best}) > 1:
            raise ValueError(
                f"{file} may be {best[0]['file_name']} or {best[1]['file_name']}: detect in the "
                "data set's own folders"
            )
        return best[0]


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(str(name).replace("\\", "/")).parts
