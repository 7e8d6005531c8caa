"""Detections as few bytes, exactly: what a line of the `prediction_log` holds.

Of 28 bytes of a detection (class, four sides, score) 8 are left where a detector finds several
names at a box (nano: its 100 queries, 40 names at once, the 300 best pairs), 18 where no two boxes
are the same:

- each class and each box is written once, and its number for each detection;
- scores by their differences as integers, which are small where the best come first;
- of all numbers the first bytes, then the second ones and so on, which is what zlib can shorten.
"""

from __future__ import annotations

import json
import zlib

import numpy as np

from ..data.fields import id_array
from .predictions import DatasetPredictions

_LINE, _ESCAPE = b"\n", b"\x1b"


def pack(head: dict, predictions: DatasetPredictions) -> bytes:
    """`head`, plain data, and all of the predictions but their images; without a line break."""
    ids = predictions.category_ids.tolist()
    classes = {category: i for i, category in enumerate(dict.fromkeys(ids))}
    which = np.fromiter(map(classes.__getitem__, ids), int, len(ids))
    boxes, box = _distinct(np.ascontiguousarray(predictions.boxes, "<f4"))
    scores = np.ascontiguousarray(predictions.scores, "<f4").view("<u4")
    text = json.dumps(head | {"classes": list(classes), "boxes": len(boxes)}).encode()
    columns = [
        _numbers(which, len(classes)),
        _numbers(box, len(boxes)),
        boxes.reshape(-1),
        np.diff(scores, prepend=scores.dtype.type(0)),
    ]
    content = len(text).to_bytes(4, "little") + text + b"".join(map(_planes, columns))
    packed = zlib.compress(content, 1)
    return packed.replace(_ESCAPE, _ESCAPE + b"\1").replace(_LINE, _ESCAPE + b"\2")


def unpack(line: bytes) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
    """(head, category ids [N], boxes float32 [N, 4], scores float32 [N]) of what `pack` made.

    Raises ValueError for anything else.
    """
    try:
        packed = line.replace(_ESCAPE + b"\2", _LINE).replace(_ESCAPE + b"\1", _ESCAPE)
        content = memoryview(zlib.decompress(packed))
        start = 4 + int.from_bytes(content[:4], "little")
        head = json.loads(bytes(content[4:start]))
        classes, number = id_array(head.pop("classes")), head.pop("boxes")
        count, columns = sum(head["counts"]), []
        for kind, length in (
            (_kind(len(classes)), count),
            (_kind(number), count),
            (np.dtype("<f4"), 4 * number),
            (np.dtype("<u4"), count),
        ):
            end = start + kind.itemsize * length
            planes = np.frombuffer(content[start:end], np.uint8).reshape(kind.itemsize, length)
            columns.append(np.ascontiguousarray(planes.T).view(kind).reshape(-1))
            start = end
        which, box, boxes, steps = columns
        scores = np.cumsum(steps, dtype="<u4").view("<f4")
        return head, classes[which], boxes.reshape(-1, 4)[box], scores
    except (zlib.error, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"no packed detections: {error}") from None


def _distinct(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes [M, 4] that there are, in the order of their first places, and of each of [N, 4]
    which one it is: equal to the bit."""
    halves = boxes.view("<u8")
    hashes = halves[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ halves[:, 1]
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    if not np.array_equal(halves[first][which], halves):  # two boxes with one hash
        return boxes, np.arange(len(boxes))
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return boxes[first[order]], place[which]


def _numbers(values: np.ndarray, most: int) -> np.ndarray:
    return values.astype(_kind(most))


def _kind(most: int) -> np.dtype:
    return np.dtype("<u2" if most <= 2**16 else "<u4")


def _planes(values: np.ndarray) -> bytes:
    return values.view(np.uint8).reshape(len(values), values.itemsize).T.tobytes()
