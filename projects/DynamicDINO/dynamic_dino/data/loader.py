"""Data loaders. What sample number n of a run is, is a pure function of (seed, n): not of the
number of workers or ranks, nor of how often the run was interrupted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader, Dataset

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class TrainBatches:
    """Endless batches of (position, index), the part of this rank.

    Batch i of all ranks together holds the positions [i * B, (i + 1) * B). Position n is entry
    n mod N of the order of epoch n div N: a permutation of the N records or, given `weights`
    (one a record), N draws with replacement.
    """

    def __init__(
        self,
        num_records: int,
        total_batch_size: int,
        *,
        seed: int,
        start_iter: int = 0,
        weights: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if total_batch_size < 1 or total_batch_size % world_size:
            raise ValueError(
                f"dataloader.train.total_batch_size={total_batch_size} must be a positive "
                f"multiple of the number of processes, {world_size}"
            )
        self.num_records = num_records
        self.total_batch_size = total_batch_size
        self.seed = seed
        self.start_iter = start_iter
        self.weights = weights
        self.rank = rank
        self.world_size = world_size

    def epoch_order(self, epoch: int) -> np.ndarray:
        """int64 [N], the records of an epoch in their order."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            return rng.permutation(self.num_records)
        return rng.choice(self.num_records, size=self.num_records, p=self.weights)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_rank = self.total_batch_size // self.world_size
        position = self.start_iter * self.total_batch_size + self.rank * per_rank
        current, order = None, None
        while True:
            batch = []
            for n in range(position, position + per_rank):
                epoch, offset = divmod(n, self.num_records)
                if epoch != current:
                    current, order = epoch, self.epoch_order(epoch)
                batch.append((n, int(order[offset])))
            yield batch
            position += self.total_batch_size


class MappedRecords(Dataset):
    """Records, kept serialised so that workers share their memory, mapped when asked for."""

    def __init__(self, records: Sequence[Record], mapper: Callable, seed: int | None = None):
        self.records = DatasetFromList(list(records), copy=True, serialize=True)
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        if self.seed is None:
            return self.mapper(self.records[item])
        position, index = item
        # the second word keeps these generators apart from those of the epochs' orders
        rng = np.random.default_rng([self.seed, 0x5EED, position])
        return self.mapper(self.records[index], rng)


def build_train_loader(
    dataset: Sequence[Record] | Sequence[Sequence[Record]],
    mapper: Callable[[Record, np.random.Generator], dict],
    total_batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    start_iter: int = 0,
    *,
    weights: Sequence[float] | None = None,
    filter_empty: bool = True,
) -> DataLoader:
    """An endless loader of lists of mapped samples, `total_batch_size` over all ranks.

    dataset       records, or one list of records per source
    start_iter    iterations already done: iteration i gives the same batch in a resumed run
    weights       per source, how much of the samples come from it (default: by its size)
    filter_empty  leaves out images without boxes

    Raises ValueError if nothing is left to train on.
    """
    sources = [list(dataset)] if _is_flat(dataset) else [list(source) for source in dataset]
    if filter_empty:
        sources = [_without_empty(source) for source in sources]
    records = [record for source in sources for record in source]
    if not records:
        raise ValueError(
            "dataloader.train.dataset has no image with a box: check its annotations, or set "
            "dataloader.train.filter_empty=False to train on images without objects"
        )
    batches = TrainBatches(
        len(records),
        total_batch_size,
        seed=seed,
        start_iter=start_iter,
        weights=None if weights is None else _record_weights(sources, weights),
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    return DataLoader(
        MappedRecords(records, mapper, seed),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_list,
    )


def build_test_loader(
    dataset: Sequence[Record] | Sequence[Sequence[Record]],
    mapper: Callable[[Record], dict],
    batch_size: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """Every record exactly once and in order, each rank its contiguous part; `batch_size` is per
    rank. Batches are lists of mapped samples."""
    sources = [dataset] if _is_flat(dataset) else dataset
    records = [record for source in sources for record in source]
    if not records:
        raise ValueError("the data set of this test loader is empty: check its annotation file")
    return DataLoader(
        MappedRecords(records, mapper),
        batch_sampler=BatchSampler(InferenceSampler(len(records)), batch_size, drop_last=False),
        num_workers=num_workers,
        collate_fn=_as_list,
    )


def _as_list(samples: list[dict]) -> list[dict]:
    return samples


def _is_flat(dataset: Sequence) -> bool:
    return len(dataset) == 0 or isinstance(dataset[0], dict)


def _without_empty(source: list[Record]) -> list[Record]:
    kept = [
        record
        for record in source
        if any(not annotation.get("iscrowd", 0) for annotation in record.get("annotations", ()))
    ]
    if len(kept) < len(source):
        logger.info("left out %d of %d images without boxes", len(source) - len(kept), len(source))
    return kept


def _record_weights(sources: list[list[Record]], weights: Sequence[float]) -> np.ndarray:
    if len(weights) != len(sources) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(
            f"dataloader.train.weights={list(weights)}: give one non-negative number for each of "
            f"the {len(sources)} data sets"
        )
    for i, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        if weight and not source:
            raise ValueError(f"data set {i} of dataloader.train has weight {weight} but no images")
    per_record = np.concatenate(
        [
            np.full(len(source), weight / max(len(source), 1))
            for source, weight in zip(sources, weights, strict=True)
        ]
    )
    return per_record / per_record.sum()
