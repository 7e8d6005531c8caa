"""Data loaders. What sample number n of a run is, is a pure function of (seed, n): not of the
number of workers or ranks, nor of how often the run was interrupted."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader, Dataset

from ..remote import RemoteError
from .balance import repeat_factors
from .records import Mixture, Record, Records, share_on_machine
from .workers import heed_loader_only

logger = logging.getLogger(__name__)


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
    """Records, in memory that workers share, mapped when asked for.

    In training, one that can't be mapped (its image is gone or damaged) gives way to another, which
    one being a function of the seed and the position too; the sample says so, "bad_records" {index:
    what is wrong}. With more than `most_bad` of them at one position the error is raised; over a
    run, the trainer counts.
    """

    def __init__(
        self, records: Mixture, mapper: Callable, seed: int | None = None, most_bad: int = 0
    ):
        self.records = records
        self.mapper = mapper
        self.seed = seed
        self.most_bad = most_bad

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        if self.seed is None:
            return self.mapper(self.records[item])
        position, index = item
        bad: dict[int, str] = {}
        for attempt in itertools.count():
            # the second word keeps these generators apart from those of the epochs' orders
            rng = np.random.default_rng([self.seed, 0x5EED, position, *([attempt] * (attempt > 0))])
            if attempt:
                index = int(rng.integers(len(self.records)))
            try:
                sample = self.mapper(self.records[index], rng)
                return sample | {"bad_records": bad} if bad else sample
            except RemoteError:  # no record is at fault, and the next one is no better
                raise
            except (ValueError, OSError) as error:
                bad[index] = " ".join(str(error).split())
                if len(bad) > self.most_bad:
                    raise


def build_train_loader(
    dataset: Sequence[Record] | Sequence[Sequence[Record]],
    mapper: Callable[[Record, np.random.Generator], dict],
    total_batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    start_iter: int = 0,
    *,
    weights: Sequence[float] | None = None,
    repeat_threshold: float | None = None,
    filter_empty: bool = True,
    max_bad: float = 5e-6,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
) -> DataLoader:
    """An endless loader of lists of mapped samples, `total_batch_size` over all ranks.

    dataset           records, or one list of records per source
    start_iter        iterations already done: iteration i gives the same batch in a resumed run
    weights           per source, how much of the samples come from it (default: by its size)
    repeat_threshold  class-balanced sampling: within a source, images of a name that less than
                      this part of its images show are drawn more often, see `repeat_factors`
    filter_empty      leaves out images without boxes
    max_bad           the part of the records that may turn out to be bad, such as images that can't
                      be read, before training stops; others take their place, see `MappedRecords`.
                      5 of a million; of less than 200,000, and with 0, none
    pin_memory        page-locked images, which are copied to a GPU faster
    prefetch_factor   batches that each worker has ready; None: PyTorch's default

    Raises ValueError if nothing is left to train on.
    """
    sources = as_sources(dataset)
    keep = [_with_objects(source) if filter_empty else None for source in sources]
    records = Mixture([_shared(source) for source in sources], keep)
    if not len(records):
        raise ValueError(
            "dataloader.train.dataset has no image with a box: check its annotations, or set "
            "dataloader.train.filter_empty=False to train on images without objects"
        )
    if not 0 <= max_bad < 1:
        raise ValueError(f"dataloader.train.max_bad={max_bad} is a part of the records: 0 to 1")
    factors = None
    if repeat_threshold is not None:
        if not 0 < repeat_threshold <= 1:
            raise ValueError(
                f"dataloader.train.repeat_threshold={repeat_threshold} is a part of the images: "
                "give a number above 0, at most 1, or None"
            )
        factors = [
            repeat_factors(
                source, np.arange(len(source)) if kept is None else kept, repeat_threshold
            )
            for source, kept in zip(sources, keep, strict=True)
        ]
    batches = TrainBatches(
        len(records),
        total_batch_size,
        seed=seed,
        start_iter=start_iter,
        weights=_record_weights(records.sizes, weights, factors),
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    return DataLoader(
        MappedRecords(records, mapper, seed, most_bad=int(max_bad * len(records))),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=heed_loader_only,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
    )


def build_test_loader(
    dataset: Sequence[Record] | Sequence[Sequence[Record]],
    mapper: Callable[[Record], dict],
    batch_size: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """Every record exactly once and in order, each rank its contiguous part; `batch_size` is per
    rank. Batches are lists of mapped samples."""
    records = Mixture(as_sources(dataset))
    if not len(records):
        raise ValueError("the data set of this test loader is empty: check its annotation file")
    return DataLoader(
        MappedRecords(records, mapper),
        batch_sampler=BatchSampler(InferenceSampler(len(records)), batch_size, drop_last=False),
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=heed_loader_only,
    )


def _as_list(samples: list[dict]) -> list[dict]:
    return samples


def as_sources(dataset: Sequence) -> list[Sequence[Record]]:
    """A loader's `dataset` as a list of sources, of which it may be the only one."""
    if isinstance(dataset, Records) or len(dataset) == 0 or isinstance(dataset[0], dict):
        return [dataset]
    return list(dataset)


def _shared(source: Sequence[Record]) -> Sequence[Record]:
    return share_on_machine(source) if isinstance(source, Records) else source


def _with_objects(source: Sequence[Record]) -> np.ndarray:
    """Indices of the records that have a box of no crowd."""
    if isinstance(source, Records):
        kept = np.flatnonzero(source.with_objects())
    else:
        objects = (
            any(not annotation.get("iscrowd", 0) for annotation in record.get("annotations", ()))
            for record in source
        )
        kept = np.flatnonzero(np.fromiter(objects, dtype=bool))
    if len(kept) < len(source):
        logger.info("left out %d of %d images without boxes", len(source) - len(kept), len(source))
    return kept


def _record_weights(
    sizes: Sequence[int],
    weights: Sequence[float] | None,
    factors: Sequence[np.ndarray] | None = None,
) -> np.ndarray | None:
    """float64 [N], the probability of each record, or None where all are equal.

    weights  a source's share of the samples; None: by its size
    factors  how much more often each record of a source is drawn than others of it
    """
    if weights is None and factors is None:
        return None
    if weights is None:
        weights = sizes
    if len(weights) != len(sizes) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(
            f"dataloader.train.weights={list(weights)}: give one non-negative number for each of "
            f"the {len(sizes)} data sets"
        )
    for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        if weight and not size:
            raise ValueError(f"data set {i} of dataloader.train has weight {weight} but no images")
    if factors is None:
        factors = [np.ones(size) for size in sizes]
    per_record = np.concatenate(
        [weight * f / max(f.sum(), 1) for weight, f in zip(weights, factors, strict=True)]
    )
    return per_record / per_record.sum()
