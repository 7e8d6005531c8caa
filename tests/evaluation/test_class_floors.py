"""`ClassFloors`: what is below a floor could not have counted, and floors rise."""

import numpy as np
import torch
import torch.multiprocessing as mp
from dynamic_dino.evaluation.class_floors import ClassFloors
from dynamic_dino.evaluation.predictions import DatasetPredictions
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st


def generated(rng, ids, count):
    """Detections in the order of their images; scores tie, and some classes have many more."""
    scores = rng.integers(0, 12, count).astype(np.float32) / 16
    classes = np.array(ids)[(len(ids) * rng.random(count) ** 2).astype(int)]
    return DatasetPredictions(np.arange(count), classes, rng.random((count, 4)), scores)


@settings(max_examples=examples(60), deadline=None)
@given(
    ids=st.sampled_from([[7, 3, 11], ["b", "a"], [2**70, 5]]),
    most=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_best_are_the_same_without_what_is_below(ids, most, seed):
    """In any order of the images, and however many are looked at between two raises."""
    rng = np.random.default_rng(seed)
    found = generated(rng, ids, 200)
    floors, parts = ClassFloors(ids, most), []

    def best(parts):
        together = DatasetPredictions.cat(parts)
        return together[np.argsort(together.image_ids)].best_per_class(most)

    for rows in np.array_split(rng.permutation(200), rng.integers(1, 60)):
        part = found[np.sort(rows)]
        part = part[floors.reached(part)]
        parts.append(part)
        if rng.random() < 0.5:
            parts = [best(parts)]
            floors.raise_by(parts[0])
    want = found.best_per_class(most)
    assert best(parts).image_ids.tolist() == want.image_ids.tolist()
    assert floors.reached(want).all()
    floors.raise_by(want)
    full = [i for i in ids if (found.category_ids == i).sum() >= most]
    for category in full:
        of_it = want.scores[want.category_ids == category]
        probe = generated(rng, [category], 40)
        assert np.array_equal(floors.reached(probe), probe.scores >= of_it.min())


def tell(rank, world, folder, found, most):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    mine = found[found.image_ids % world == rank]
    alone, floors = ClassFloors([1, 2], most), ClassFloors([1, 2], most, folder / "notes")
    for each in (alone, floors):
        each.raise_by(mine.best_per_class(most))
    assert alone.reached(mine).all(), "it has too few of its own"
    torch.distributed.barrier()
    floors.raise_by(mine.best_per_class(most))
    np.save(folder / f"reached{rank}.npy", floors.reached(found))
    torch.distributed.destroy_process_group()


def test_two_processes_know_more_than_each(tmp_path):
    """40 detections of a class in each process, of which together 60 count: no process has seen 60
    better ones, both together have."""
    rng = np.random.default_rng()
    scores = rng.permutation(160).astype(np.float32)
    found = DatasetPredictions(
        np.arange(160), np.arange(160) // 2 % 2 + 1, rng.random((160, 4)), scores
    )
    mp.start_processes(tell, (2, tmp_path, found, 60), nprocs=2, start_method="fork")
    best = found.best_per_class(60)
    for rank in range(2):
        reached = np.load(tmp_path / f"reached{rank}.npy")
        assert set(best.image_ids) <= set(found.image_ids[reached])
        assert 120 <= reached.sum() < 160
