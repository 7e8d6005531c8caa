"""Run in data/test_sharing.py: two processes that read one data set."""

import argparse
import json
from pathlib import Path

import numpy as np
from detectron2.utils import comm
from dynamic_dino.data import build_train_loader, load_datasets
from dynamic_dino.data.records import Records


def main(args: argparse.Namespace) -> None:
    loader = build_train_loader(
        load_datasets(str(args.file)), lambda r, rng: r, 2, filter_empty=False
    )
    (records,) = loader.dataset.records.sources
    assert isinstance(records, Records)
    # A private map of the same file: what both processes hold is one memory.
    maps = all(isinstance(array, np.memmap) for array in records.buffers().values())
    files = {array.filename for array in records.buffers().values()}
    comm.synchronize()  # the first process has removed the files by now
    report = {
        "records": list(records),
        "maps": maps,
        "files": sorted(map(str, files)),
        "left": [str(file) for file in files if Path(file).exists()],
    }
    (args.output / f"{comm.get_rank()}.json").write_text(json.dumps(report))
