"""Records of a whole data set in a few flat arrays, which forked workers share.

A list of 1.56 million dicts would take tens of GB, and every worker that touches them would end up
with a copy, because counting references writes to their memory. Here a record is made when it is
asked for. ``benchmarks/record_memory.py`` measures it.
"""

from __future__ import annotations

import json
import operator
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from detectron2.data.common import DatasetFromList
from detectron2.structures import BoxMode
from detectron2.utils import comm

from ..remote import address

Record = dict[str, Any]


class Texts(Sequence[str]):
    """Strings in one buffer: uint8 [bytes], and int64 [N], where each one ends."""

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Texts:
        data, ends = bytearray(), []
        for string in strings:
            data += string.encode()
            ends.append(len(data))
        return cls(np.frombuffer(data, dtype=np.uint8), np.array(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def size(self, index: int) -> int:
        """In bytes."""
        return int(self.ends[index] - (self.ends[index - 1] if index else 0))

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.data[start : self.ends[index]].tobytes().decode()


class Records(Sequence[Record]):
    """The records of one data set, see `datasets.load_datasets`; each access makes a new dict.

    dataset_name, image_root   the same for all; image_root is put before relative file names
    names      file name of each of the N records
    ids        image id: int64 [N], or a list
    sizes      int32 [N, 2], (width, height)
    first      int64 [N + 1]: the annotations of record i are first[i] ... first[i + 1] - 1 of
    boxes      float32 [M, 4], XYWH in pixels
    classes    int32 [M], contiguous
    crowd      bool [M]
    extra      JSON of further fields of each record, None where there are none
    """

    ARRAYS = ("sizes", "first", "boxes", "classes", "crowd")

    def __init__(
        self,
        dataset_name: str,
        image_root: str | Path,
        names: Texts,
        ids: np.ndarray | list,
        sizes: np.ndarray,
        first: np.ndarray,
        boxes: np.ndarray,
        classes: np.ndarray,
        crowd: np.ndarray,
        extra: Texts | None = None,
    ) -> None:
        self.dataset_name = dataset_name
        self.image_root = address(image_root) or str(image_root)
        self.names = names
        self.ids = ids
        self.sizes = sizes.astype(np.int32, copy=False)
        self.first = first
        self.boxes = boxes.astype(np.float32, copy=False)
        self.classes = classes.astype(np.int32, copy=False)
        self.crowd = crowd.astype(bool, copy=False)
        self.extra = extra

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = operator.index(index)
        i += len(self) if i < 0 else 0
        if not 0 <= i < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = slice(self.first[i], self.first[i + 1])
        width, height = self.sizes[i].tolist()
        image_id = self.ids[i]
        return {
            "file_name": os.path.join(self.image_root, self.names[i]),
            "image_id": image_id.item() if isinstance(image_id, np.generic) else image_id,
            "height": height,
            "width": width,
            "dataset_name": self.dataset_name,
            **(json.loads(self.extra[i]) if self.extra is not None else {}),
            "annotations": [
                {
                    "bbox": box,
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": category,
                    "iscrowd": int(crowd),
                }
                for box, category, crowd in zip(
                    self.boxes[part].tolist(),
                    self.classes[part].tolist(),
                    self.crowd[part].tolist(),
                    strict=True,
                )
            ],
        }

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def select(self, rows: np.ndarray) -> Records:
        """Some of the records, int [K], in this order."""
        parts = [np.arange(self.first[i], self.first[i + 1]) for i in rows.tolist()]
        counts = [len(part) for part in parts]
        boxes = np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64)
        ids = self.ids[rows] if isinstance(self.ids, np.ndarray) else [self.ids[i] for i in rows]
        return Records(
            self.dataset_name,
            self.image_root,
            Texts.of(self.names[i] for i in rows.tolist()),
            ids,
            self.sizes[rows],
            np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            self.boxes[boxes],
            self.classes[boxes],
            self.crowd[boxes],
            None if self.extra is None else Texts.of(self.extra[i] for i in rows.tolist()),
        )

    def with_objects(self) -> np.ndarray:
        """bool [N]: the records that have a box of no crowd."""
        objects = np.concatenate([[0], np.cumsum(~self.crowd)])
        return objects[self.first[1:]] > objects[self.first[:-1]]

    def buffers(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        texts = {"names": self.names} | ({} if self.extra is None else {"extra": self.extra})
        for name, text in texts.items():
            arrays |= {f"{name}.data": text.data, f"{name}.ends": text.ends}
        return arrays | ({"ids": self.ids} if isinstance(self.ids, np.ndarray) else {})

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.buffers().values())

    def on(self, buffers: dict[str, np.ndarray]) -> Records:
        """The same records on other arrays with the same content."""

        def texts(name: str) -> Texts:
            return Texts(buffers[f"{name}.data"], buffers[f"{name}.ends"])

        return Records(
            self.dataset_name,
            self.image_root,
            texts("names"),
            buffers.get("ids", self.ids),
            **{name: buffers[name] for name in self.ARRAYS},
            extra=None if self.extra is None else texts("extra"),
        )


class Mixture(Sequence[Record]):
    """Records of several sources, one after the other, without a copy of any `Records`.

    Sources of other kinds, lists of dicts, are serialised as Detectron2 does, for the same end.
    `keep`, for each source: the indices that count, None for all.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Record]],
        keep: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        self.sources = [
            source if isinstance(source, Records) else DatasetFromList(list(source), copy=True)
            for source in sources
        ]
        self.keep = list(keep) if keep is not None else [None] * len(self.sources)
        self.sizes = [
            len(source) if kept is None else len(kept)
            for source, kept in zip(self.sources, self.keep, strict=True)
        ]
        self.ends = np.cumsum(self.sizes, dtype=np.int64)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self.ends, index, side="right"))
        index -= int(self.ends[number]) - self.sizes[number]
        kept = self.keep[number]
        return self.sources[number][index if kept is None else int(kept[index])]


def share_on_machine(records: Records) -> Records:
    """One copy for all processes of a machine: that of its first one, which the others map.

    Collective: every process must call it with the same records. Those that all have mapped from a
    file already stay as they are.
    """
    if comm.get_world_size() == 1:
        return records
    arrays = records.buffers().values()
    if all(comm.all_gather(all(isinstance(array, np.memmap) for array in arrays))):
        return records
    first = comm.get_local_rank() == 0
    folder = _folder_for(records.nbytes) if first else None
    if first:
        for name, array in records.buffers().items():
            np.save(f"{folder}/{name}.npy", array)
    mine = comm.get_rank() - comm.get_local_rank()
    folders = comm.all_gather(folder)  # after which all files are written
    shared = records.on(
        {
            name: np.load(f"{folders[mine]}/{name}.npy", mmap_mode="r")
            for name, array in records.buffers().items()
        }
    )
    comm.synchronize()
    if first:
        shutil.rmtree(folder)  # the maps stay valid; nothing is left behind when the processes end
    return shared


def _folder_for(size: int) -> str:
    """A new folder, in memory where that has room (Linux), else among the temporary files."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free
    return tempfile.mkdtemp(prefix="dynamic-dino-", dir=memory if room > 1.1 * size else None)
