import itertools
import json
import subprocess

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data.samplers import RepeatFactorTrainingSampler
from dynamic_dino.config import ConfigError
from dynamic_dino.data import (
    TestMapper,
    TrainMapper,
    build_test_loader,
    build_train_loader,
    color_jitter,
    datasets,
    load_datasets,
)
from dynamic_dino.data.balance import repeat_factors
from dynamic_dino.data.loader import TrainBatches
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.data.workers import WorkerEndedError, loading_errors
from helpers import miniatures
from helpers.seeds import fresh_rng


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    file = write_drawn_dataset(root, 10, 64, seed=int(fresh_rng().integers(1000)))
    datasets.register_coco_json("test_loader", file, root / "drawn/train")
    return "test_loader"


def batches(name, count, **options):
    mapper = TrainMapper(name, 64, max_phrases=5, augmentations=[color_jitter()])
    options = {"total_batch_size": 4, "seed": 3, **options}
    loader = build_train_loader(load_datasets(name), mapper, **options)
    return list(itertools.islice(loader, count))


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
        assert x["file_name"] == y["file_name"] and x["prompt"] == y["prompt"]
        assert torch.equal(x["image"], y["image"])
        assert torch.equal(x["instances"].gt_boxes.tensor, y["instances"].gt_boxes.tensor)
        assert torch.equal(x["instances"].gt_classes, y["instances"].gt_classes)


@pytest.fixture(scope="module")
def reference(name):
    return batches(name, 7)  # 28 samples of 10 records: into the third epoch


def test_workers_change_nothing(name, reference):
    assert_equal(batches(name, 7, num_workers=2), reference)


def test_resuming_changes_nothing(name, reference):
    for start in (1, 3, 5):
        assert_equal(batches(name, 7 - start, start_iter=start), reference[start:])
    assert_equal(batches(name, 3, start_iter=4, num_workers=2), reference[4:])


def test_another_seed_is_another_run(name, reference):
    other = batches(name, 7, seed=4)
    files = [[s["file_name"] for b in run for s in b] for run in (reference, other)]
    assert files[0] != files[1]


def test_the_same_image_is_augmented_differently_each_epoch(reference):
    samples = list(itertools.chain(*reference))
    by_file = {}
    for sample in samples:
        by_file.setdefault(sample["file_name"], []).append(sample)
    for first, second, *_ in by_file.values():
        assert not torch.equal(first["image"], second["image"])


def test_an_epoch_has_every_record_once():
    sampler = TrainBatches(10, 5, seed=0)
    drawn = [i for batch in itertools.islice(sampler, 6) for i in batch]
    assert [n for n, _ in drawn] == list(range(30))
    epochs = [[i for _, i in drawn[k : k + 10]] for k in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("weights", [None, np.arange(7) / 21])
def test_ranks_partition_the_batch(weights):
    whole = itertools.islice(TrainBatches(7, 6, seed=9, weights=weights, start_iter=2), 5)
    halves = [
        itertools.islice(
            TrainBatches(7, 6, seed=9, weights=weights, start_iter=2, rank=rank, world_size=2), 5
        )
        for rank in range(2)
    ]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert batch == first + second and len(first) == 3


def labelled(source, labels, crowd=()):
    """Records that have a box of each of the given classes."""
    return [
        {
            "source": source,
            "index": i,
            "annotations": [
                {"category_id": c, "iscrowd": int((i, c) in crowd), "bbox": [0, 0, 5, 5]}
                for c in classes
            ],
        }
        for i, classes in enumerate(labels)
    ]


def test_repeat_factors_are_detectron2s(name):
    """Of records as arrays, and of lists of dicts; of all images, and of some."""
    rng = fresh_rng()
    drawn = load_datasets(name)
    labels = [rng.choice(20, rng.integers(1, 4), p=np.arange(1, 21) / 210) for _ in range(200)]
    for source in (drawn, labelled(0, [found.tolist() for found in labels])):
        kept = np.sort(rng.permutation(len(source))[: len(source) * 2 // 3])
        for threshold in (0.02, 0.3, 1.0):
            for chosen in (np.arange(len(source)), kept):
                wanted = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                    [source[int(i)] for i in chosen], threshold
                )
                np.testing.assert_allclose(
                    repeat_factors(source, chosen, threshold), wanted, rtol=1e-6
                )


def test_a_signal_for_the_run_spares_its_workers():
    """Only the loader ends them: the run needs them to finish an iteration."""
    records = [{"index": i} for i in range(8)]
    loader = build_train_loader(
        records, lambda record, rng: dict(record), 2, num_workers=1, filter_empty=False
    )
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    for _ in range(9):  # more than were under way
        next(batches)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_class_balanced_sampling():
    """A class in 1 of 100 images, at threshold 0.25, is drawn sqrt(25) = 5 times as often; each
    source keeps its share."""
    common, rare = [[0]] * 99, [[0, 1]]
    sources = [labelled(0, common + rare), labelled(1, [[3]] * 50), labelled(2, [[]] * 7)]
    loader = build_train_loader(
        sources, lambda r, rng: r, 20_000, weights=[3, 1, 0], repeat_threshold=0.25
    )
    drawn = next(iter(loader))
    first = [r for r in drawn if r["source"] == 0]
    assert len(first) / 20_000 == pytest.approx(0.75, abs=0.02)
    assert sum(r["index"] == 99 for r in first) / len(first) == pytest.approx(5 / 104, abs=0.01)
    # by size where there are no weights, each image as often as another at the lowest threshold
    plain = build_train_loader(sources, lambda r, rng: r, 20_000, repeat_threshold=1e-6)
    plain = [(r["source"], r["index"]) for r in next(iter(plain))]
    counts = np.array([plain.count(key) for key in [(0, 0), (0, 99), (1, 7)]])
    assert counts / 20_000 == pytest.approx([1 / 150] * 3, abs=0.003)
    with pytest.raises(ValueError, match="repeat_threshold=2 is a part"):
        build_train_loader(sources, None, 4, repeat_threshold=2)


def test_captions_are_not_balanced():
    captions = labelled(0, [[0], [0, 1]])
    for record in captions:
        record["caption"] = "a cat"
    assert repeat_factors(captions, np.arange(2), 1.0).tolist() == [1, 1]


def test_the_batch_must_divide():
    with pytest.raises(ValueError, match="total_batch_size=5 .* 2"):
        TrainBatches(7, 5, seed=0, world_size=2)


def test_weighted_mixture():
    sources = [
        [{"annotations": [{}], "source": k} for _ in range(n)] for k, n in enumerate((5, 50))
    ]
    loader = build_train_loader(sources, lambda r, rng: r["source"], 100, weights=[3, 1])
    drawn = [s for batch in itertools.islice(loader, 20) for s in batch]
    assert 0.20 < np.mean(drawn) < 0.30  # expected .25, standard deviation .01
    loader = build_train_loader(sources, lambda r, rng: r["source"], 55)
    assert sum(next(iter(loader))) == 50  # without weights: by size
    with pytest.raises(ValueError, match="one non-negative number for each of the 2"):
        build_train_loader(sources, None, 4, weights=[1])


def test_images_without_boxes_are_left_out(name):
    records = load_datasets(name)
    crowd = {**records[0], "annotations": [{**records[0]["annotations"][0], "iscrowd": 1}]}
    empty = {**records[1], "annotations": []}
    loader = build_train_loader([crowd, empty, *records[2:]], lambda r, rng: r["image_id"], 8)
    assert len(loader.dataset) == 8
    with pytest.raises(ValueError, match="no image with a box"):
        build_train_loader([crowd, empty], None, 1)
    assert len(build_train_loader([crowd, empty], None, 1, filter_empty=False).dataset) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_and_in_order(name, workers):
    records = load_datasets(name)
    loader = build_test_loader(records, TestMapper(name, 64), batch_size=4, num_workers=workers)
    seen = list(loader)
    assert [len(batch) for batch in seen] == [4, 4, 2] and len(loader) == 3
    assert [s["image_id"] for batch in seen for s in batch] == [r["image_id"] for r in records]


def test_lazy_config_and_interpolation(name):
    node = L(build_train_loader)(
        dataset=L(load_datasets)(names=name),
        mapper=L(TrainMapper)(
            dataset="${..dataset.names}",
            size=64,
            max_phrases=5,
            augmentations=[L(color_jitter)()],
        ),
        total_batch_size=4,
        seed=3,
    )
    node.start_iter = 2
    assert_equal([next(iter(instantiate(node)))], batches(name, 1, start_iter=2))
    names = L(load_datasets)(names=[name, name])
    mapper = L(TrainMapper)(dataset=[name, name], size=[64, 96], max_phrases=5)
    loader = instantiate(
        L(build_train_loader)(dataset=names, mapper=mapper, total_batch_size=2, weights=[1, 2])
    )
    assert len(next(iter(loader))) == 2 and len(loader.dataset) == 20


def test_detection_and_grounding_mix(name, tmp_path):
    (record, *_) = load_datasets(name)
    line = {"filename": record["file_name"], "height": record["height"], "width": record["width"]}
    region = {"bbox": [0, 0, 9, 9], "phrase": "small corner"}
    line["grounding"] = {"caption": "the small corner of a picture", "regions": [region]}
    file = tmp_path / "g.jsonl"
    file.write_text(json.dumps(line))
    datasets.register_odvg_jsonl("test_loader_grounding", file, tmp_path)
    names = [name, "test_loader_grounding"]
    node = L(build_train_loader)(
        dataset=L(load_datasets)(names=names),
        mapper=L(TrainMapper)(
            dataset="${..dataset.names}", size=64, augmentations=L(color_jitter)(), max_phrases=5
        ),
        total_batch_size=8,
        weights=[1, 1],
    )
    prompts = {sample["prompt"].text for sample in next(iter(instantiate(node)))}
    assert "the small corner of a picture" in prompts and len(prompts) > 1


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Miniatures of the four sources of the paper, by their names."""
    root = tmp_path_factory.mktemp("mixture")
    miniatures.write_all(root, seed=int(fresh_rng().integers(1 << 30)))
    datasets.register_builtin(root)
    yield ["objects365_v1_train", "v3det_train", "gqa_train", "flickr30k_train"]
    datasets.register_builtin()


def mixed_batches(names, count, **options):
    mapper = TrainMapper(
        names, 64, augmentations=[color_jitter()], phrase_prompts=0.5, phrase_dropout=0.3
    )
    options = {"total_batch_size": 4, "seed": 3, "weights": [4, 1, 2, 2], **options}
    loader = build_train_loader(load_datasets(names), mapper, **options)
    return list(itertools.islice(loader, count))


def test_the_mixture_is_the_same_for_any_workers_and_after_resuming(mixture):
    reference = mixed_batches(mixture, 10)
    assert len({sample["prompt"].text for batch in reference for sample in batch}) > 20
    assert_equal(mixed_batches(mixture, 10, num_workers=3), reference)
    assert_equal(mixed_batches(mixture, 6, num_workers=2, start_iter=4), reference[4:])


def test_what_a_loader_raises_is_one_line():
    """As torch words it, of a worker or of this process."""
    of_a_worker = "Caught ValueError in DataLoader worker process 0.\nTraceback\nValueError: a.png"
    for error in (ValueError(of_a_worker), ValueError("a.png"), FileNotFoundError("a.png")):
        with pytest.raises(ConfigError, match=r"^a\.png; go on$"):
            with loading_errors(lambda: "go on"):
                raise error
    killed = "DataLoader worker (pid 7) is killed by signal: Killed. \nDetails are lost"
    with pytest.raises(WorkerEndedError, match=r"pid 7.*num_workers.*; go on$"):
        with loading_errors(lambda: "go on"):
            raise RuntimeError(killed)
    for noticed in (ConnectionResetError(104, "Connection reset by peer"), EOFError()):
        with pytest.raises(WorkerEndedError, match="was ended from outside"), loading_errors(str):
            raise noticed
    with pytest.raises(RuntimeError, match="^a bug$"), loading_errors(str):
        raise RuntimeError("a bug")
