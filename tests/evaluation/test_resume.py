"""An interrupted evaluation goes on where it stopped, to the same numbers."""

import json
import logging
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from detectron2.config import LazyCall as L
from detectron2.structures import Boxes, Instances
from dynamic_dino.config import TRAIN_DEFAULTS
from dynamic_dino.data import datasets
from dynamic_dino.data.datasets import load_coco_json, load_datasets, register_coco_json
from dynamic_dino.data.fields import id_array
from dynamic_dino.data.loader import build_test_loader
from dynamic_dino.data.mapper import TestMapper
from dynamic_dino.engine import evaluate
from dynamic_dino.engine.evaluate import do_test
from dynamic_dino.evaluation import DetectionEvaluator, PredictionLog, evaluator
from dynamic_dino.evaluation.packing import pack, unpack
from dynamic_dino.evaluation.prediction_log import Found, numbered_lines
from dynamic_dino.evaluation.predictions import DatasetPredictions
from dynamic_dino.moe.routing import Routing
from helpers.seeds import examples, fresh_rng
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

IMAGES = 14


class Noise(torch.nn.Module):
    """A detector whose boxes are noise that depends on the pixels and on its weight only."""

    def __init__(self, stop_after=None, die=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.max_detections = 5
        self.seen, self.stop_after, self.die = [], stop_after, die

    def forward(self, batch):
        if self.stop_after is not None and len(self.seen) >= self.stop_after:
            if self.die:
                os._exit(9)
            raise KeyboardInterrupt
        self.seen += [sample["image_id"] for sample in batch]
        results, experts = [], []
        for sample in batch:
            seed = int(sample["image"].long().sum()) + int(self.weight)
            rng = np.random.default_rng(seed)
            count = int(rng.integers(0, self.max_detections + 1))
            found = Instances((sample["height"], sample["width"]))
            corner = rng.uniform(0, 6, (count, 2))
            boxes = np.concatenate([corner, corner + rng.uniform(16, 26, (count, 2))], 1)
            found.pred_boxes = Boxes(torch.from_numpy(boxes).float())
            found.scores = torch.from_numpy(rng.random(count)).float()
            found.pred_classes = torch.from_numpy(rng.integers(0, 2, count))
            results.append({"instances": found})
            experts.append(torch.from_numpy(rng.integers(0, 4, (3, 2))).int())
        ids = torch.cat(experts)
        results[0]["routings"] = [Routing(ids, torch.ones(ids.shape), torch.ones(len(ids), 4) / 4)]
        return results


@pytest.fixture
def recipe(tmp_path):
    """recipe("output folder") evaluates a data set of noisy images with random boxes."""
    rng = fresh_rng()
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i, "name": name} for i, name in ((3, "mug"), (8, "acorn"))]
    for i in rng.permutation(IMAGES).tolist():
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        image = {"id": i, "file_name": f"{i}.png", "height": 32, "width": 32}
        image |= {"neg_category_ids": [3, 8], "not_exhaustive_category_ids": []}  # as in LVIS
        content["images"].append(image)
        for _ in range(3):
            box = np.concatenate([rng.uniform(0, 6, 2), rng.uniform(16, 26, 2)]).tolist()
            annotation = {"image_id": i, "category_id": int(rng.choice([3, 8])), "bbox": box}
            content["annotations"].append({"id": len(content["annotations"]) + 1, **annotation})
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(content))
    register_coco_json("resume_test", file, tmp_path)

    def make(output, **evaluator):
        loader = L(build_test_loader)(
            dataset=L(load_coco_json)(
                json_file=str(file), image_root=str(tmp_path), name="resume_test"
            ),
            mapper=L(TestMapper)(dataset="resume_test", size=32),
            batch_size=2,
        )
        return OmegaConf.create(
            {
                "model": {"_target_": "unused"},
                "train": TRAIN_DEFAULTS | {"output_dir": str(tmp_path / output)},
                "dataloader": {
                    "test": {"val": loader},
                    "evaluator": {
                        "val": L(DetectionEvaluator)(dataset_name="resume_test", **evaluator)
                    },
                },
            },
            flags={"allow_objects": True},
        )

    return make


def files(tmp_path, output):
    folder = tmp_path / output / "evaluation" / "val"
    texts = ["predictions.json", "results.json", "results.txt"]
    assert sorted(p.name for p in folder.iterdir()) == ["pictures.jpg", *texts]
    return {name: (folder / name).read_text() for name in texts}


def interrupt(cfg, after):
    model = Noise(stop_after=after)
    with pytest.raises(KeyboardInterrupt):
        do_test(cfg, model)
    return model.seen


def test_it_goes_on_without_loading_what_is_done(recipe, tmp_path, caplog):
    whole = do_test(recipe("whole"), Noise())
    assert 0 < whole["val/AP50"] < 100
    done = interrupt(recipe("cut"), 6)
    assert len(done) == 6
    for image in done:
        (tmp_path / f"{image}.png").rename(tmp_path / f"{image}.hidden")
    model = Noise()
    caplog.set_level(logging.INFO)
    assert do_test(recipe("cut"), model) == whole
    assert sorted(done + model.seen) == list(range(IMAGES))
    assert "6 of 14 images were evaluated before" in caplog.text
    assert files(tmp_path, "cut") == files(tmp_path, "whole")

    for image in done:
        (tmp_path / f"{image}.hidden").rename(tmp_path / f"{image}.png")
    again = Noise()
    assert do_test(recipe("cut"), again) == whole
    assert len(again.seen) == IMAGES, "a complete evaluation leaves nothing to go on from"


def test_twice_interrupted_and_a_line_cut(recipe, tmp_path):
    whole = do_test(recipe("whole"), Noise())
    interrupt(recipe("cut"), 4)
    interrupt(recipe("cut"), 4)
    logs = sorted((tmp_path / "cut/evaluation/val/unfinished").iterdir())
    assert [log.name for log in logs] == ["00000.log", "00001.log"]
    # the last two images, of four, are lost; an empty file is what a process left that died early
    logs[0].write_bytes(logs[0].read_bytes()[:-40])
    (logs[0].parent / "00002.log").write_text("")
    model = Noise()
    assert do_test(recipe("cut"), model) == whole
    assert len(model.seen) == IMAGES - 6
    assert files(tmp_path, "cut") == files(tmp_path, "whole")


@pytest.fixture(scope="module")
def one_log(tmp_path_factory):
    """The lines of the log of an evaluation, and a function that reads such lines: the images, in
    their order, with their prompt and their boxes."""
    folder, fingerprint = tmp_path_factory.mktemp("log"), {"weights": "a"}
    log, rng = PredictionLog(folder, fingerprint), np.random.default_rng(0)
    for i in range(0, 12, 2):
        counts = rng.integers(0, 3, 2).tolist()
        boxes = rng.random((sum(counts), 4))
        found = DatasetPredictions(
            np.repeat([i, i + 1], counts), np.ones(len(boxes), int), boxes, boxes[:, 0]
        )
        log.append(Found([i, i + 1], [(i // 4, 7), (i // 6,)], counts, found))

    def read(content: bytes) -> dict:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "00000.log").write_bytes(content)
        log = PredictionLog(folder, fingerprint)
        found = {}
        for part in log.earlier():
            edges = np.cumsum([0, *part.counts])
            for i, image in enumerate(part.images):
                assert image not in found
                boxes = part.predictions.boxes[edges[i] : edges[i + 1]]
                found[image] = part.prompts[i], boxes.tobytes()
        assert log.done == found.keys()
        return found

    with (folder / "00000.log").open("rb") as file:
        return list(file), read


@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_a_damaged_log_says_nothing_wrong(one_log, data):
    """Whatever happens to its lines and bytes, what is read was written, and each image once; of
    lines that are as they were, all is read."""
    lines, read = one_log
    whole = read(b"".join(lines))
    assert len(whole) == 12
    changed = data.draw(st.lists(st.sampled_from(lines[1:]), max_size=9))  # left out, twice, moved
    content = bytearray(b"".join([lines[0], *changed]))
    for _ in range(data.draw(st.integers(0, 3))):
        where = data.draw(st.integers(0, len(content) - 1))
        content[where] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    found = read(bytes(content))
    assert found.items() <= whole.items()
    if content == b"".join([lines[0], *changed]) and changed[:1] == lines[1:2]:
        assert {0, 1} <= found.keys()


@settings(max_examples=examples(40), deadline=None)
@given(
    count=st.integers(0, 400),
    queries=st.integers(1, 900),
    ids=st.sampled_from([range(1, 1204), [3, 2**40, 5], ["a", "b"], [1, "b", 2**70]]),
    seed=st.integers(0, 2**32 - 1),
)
def test_detections_are_packed_exactly(count, queries, ids, seed):
    """To the bit, with any ids, doubled boxes, zeros of either sign, denormal and huge numbers."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (queries, 4), dtype=np.uint32)
    bits[(bits >> 23 & 255) == 255] = 0x80000000  # not infinite, not NaN
    boxes = bits.view(np.float32)[rng.integers(0, queries, count)]
    scores = rng.random(count).astype(np.float32)
    scores = scores if rng.random() < 0.5 else -np.sort(-scores)
    categories = id_array(ids[i] for i in rng.integers(0, len(ids), count))
    found = DatasetPredictions(np.zeros(count, int), categories, boxes, scores)
    line = pack(head := {"counts": [count], "images": ["x\n"]}, found)
    assert b"\n" not in line
    read, *columns = unpack(line)
    assert read == head and columns[0].tolist() == categories.tolist()
    assert [c.tobytes() for c in columns[1:]] == [boxes.tobytes(), scores.tobytes()]


def test_a_log_of_an_older_form_is_named(tmp_path, caplog):
    (tmp_path / "00000.jsonl").write_text('a2a51743 {"weights": "a"}\n')
    log = PredictionLog(tmp_path, {"weights": "a"})
    assert not log.done and "another form of the log: it is removed, and all images" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["00000.log"]


def test_damage_is_named(one_log, caplog):
    lines, read = one_log
    flipped = lines[2][:20] + bytes([lines[2][20] ^ 64]) + lines[2][21:]
    assert len(read(b"".join([*lines[:2], flipped, b"5\n", *lines[3:], lines[5]]))) == 10
    assert "00000.log is damaged, line 3, 4, 9 (a second time)" in caplog.text
    assert len(read(b"".join([*lines[:3], b"\0" * 9 + b"\n", *lines[4:]]))) == 8
    assert "line 4, 5 (its prompt is lost)" in caplog.text
    caplog.clear()
    assert not read(b"[]\n" + b"".join(lines[1:])) and "line 1 is damaged" in caplog.text


def test_sets_that_were_complete_are_not_evaluated_again(recipe):
    def two_sets(output):
        cfg = recipe(output)
        for kind in ("test", "evaluator"):
            cfg.dataloader[kind]["second"] = cfg.dataloader[kind]["val"].copy()
        return cfg

    whole = do_test(two_sets("whole"), Noise())
    interrupt(two_sets("cut"), IMAGES + 4)
    model = Noise()
    assert do_test(two_sets("cut"), model) == whole
    assert len(model.seen) == IMAGES - 4


def test_annotations_are_read_and_weights_hashed_once(recipe, tmp_path, monkeypatch):
    """Weights in each evaluation, of all of its sets; annotations in a run, until they change."""
    calls = Counter()

    def counted(module, name):
        function = getattr(module, name)

        def call(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counted(evaluate, "module_fingerprint")
    counted(evaluator, "read_ground_truth")
    counted(datasets, "load_coco_json")
    cfg, file = recipe("once"), tmp_path / "truth.json"
    cfg.dataloader.test.val.dataset = L(load_datasets)(names="resume_test")
    for kind in ("test", "evaluator"):
        cfg.dataloader[kind]["second"] = cfg.dataloader[kind]["val"].copy()
    model = Noise()
    first = do_test(cfg, model)
    before = calls.copy()
    assert do_test(cfg, model) == first
    assert before == {"module_fingerprint": 1, "read_ground_truth": 1, "load_coco_json": 1}
    assert calls - before == {"module_fingerprint": 1}
    content = json.loads(file.read_text())
    del content["annotations"][::2]
    file.write_text(json.dumps(content))
    assert do_test(cfg, model) != first
    assert calls == {"module_fingerprint": 3, "read_ground_truth": 2, "load_coco_json": 2}


def test_all_done_but_the_scores(recipe, tmp_path, monkeypatch):
    whole = do_test(recipe("whole"), Noise())
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(
            DetectionEvaluator, "evaluate", lambda self: (_ for _ in ()).throw(MemoryError)
        )
        do_test(recipe("cut"), Noise())
    model = Noise()
    assert do_test(recipe("cut"), model) == whole and not model.seen


@pytest.mark.parametrize("change", ["set of weights", "model", "data set", "loader", "protocol"])
def test_another_evaluation_starts_afresh_and_says_so(recipe, tmp_path, caplog, change):
    interrupt(recipe("cut"), 6)
    cfg, model = recipe("cut"), Noise()
    if change == "set of weights":
        model.weight.data += 1
    elif change == "model":
        cfg = recipe("cut", detector={"max_detections": 3})
    elif change == "protocol":
        cfg = recipe("cut", max_dets=6)
    elif change == "data set":
        file = tmp_path / "truth.json"
        file.write_text(file.read_text() + " ")
    else:
        cfg.dataloader.test.val.mapper.prompt_names = 2
    caplog.set_level(logging.WARNING)
    do_test(cfg, model)
    assert len(model.seen) == IMAGES
    assert f"found with another {change}" in caplog.text
    assert model.max_detections == 5, "the detector's settings are its own again"


def test_batch_size_and_workers_are_no_other_evaluation(recipe):
    interrupt(recipe("cut"), 6)
    cfg, model = recipe("cut"), Noise()
    cfg.dataloader.test.val.batch_size = 3
    do_test(cfg, model)
    assert len(model.seen) == IMAGES - 6


@pytest.fixture
def fixed(recipe, monkeypatch):
    """The recipe with fixed AP of the 5 best of each class, of which there are some 17."""
    monkeypatch.setattr(evaluator, "PRUNE_EVERY", 6)
    return lambda output: recipe(output, protocol="lvis-fixed", max_dets=5)


def test_what_can_not_count_is_not_written_down(recipe, fixed, tmp_path, monkeypatch):
    """And after an interruption, with what was written down only, the files are the same."""
    monkeypatch.setattr(PredictionLog, "remove", lambda self: None)
    with monkeypatch.context() as patch:
        patch.setattr(evaluator.ClassFloors, "reached", lambda _, found: np.ones(len(found), bool))
        whole = do_test(fixed("whole"), Noise())

    def written(output):
        folder = tmp_path / output / "evaluation/val/unfinished"
        lines = [line for log in folder.glob("*.log") for _, line in list(numbered_lines(log))[1:]]
        assert sorted(i for line in lines for i in line["images"]) == list(range(IMAGES))
        shutil.move(folder, tmp_path / f"log of {output}")
        return sum(sum(line["counts"]) for line in lines)

    interrupt(fixed("cut"), 8)
    assert do_test(fixed("cut"), Noise()) == whole
    do_test(recipe("coco"), Noise())
    assert written("cut") < written("whole") == written("coco")
    assert files(tmp_path, "cut") == files(tmp_path, "whole")


def run_rank(rank, world, store, cfg, die, seen):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    model = Noise(stop_after=4 if die and rank == 1 else None, die=die)
    do_test(cfg, model)
    (seen / f"rank{rank}.json").write_text(json.dumps(model.seen))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first, second", [(1, 2), (2, 2), (2, 1)])
@pytest.mark.parametrize("protocol", ["coco", "lvis-fixed"])
def test_with_another_number_of_processes(
    recipe, fixed, tmp_path, monkeypatch, first, second, protocol
):
    recipe = fixed if protocol == "lvis-fixed" else recipe
    whole = do_test(recipe("whole"), Noise())
    cfg, done = recipe("cut"), 6
    if first == 1:
        interrupt(cfg, 6)
    else:  # rank 1 is killed in the middle of its part
        with pytest.raises(mp.ProcessExitedException):
            mp.start_processes(
                run_rank, (2, tmp_path / "s1", cfg, True, tmp_path), 2, start_method="fork"
            )
        logs = (tmp_path / "cut/evaluation/val/unfinished").glob("*.log")
        lines = [line for log in logs for _, line in list(numbered_lines(log))[1:]]
        done = sum(len(line["images"]) for line in lines)
        assert 4 <= done <= 11
    if second == 1:
        model = Noise()
        assert do_test(cfg, model) == whole
        seen = model.seen
    else:
        mp.start_processes(
            run_rank, (2, tmp_path / "s2", cfg, False, tmp_path), 2, start_method="fork"
        )
        seen = [i for r in (0, 1) for i in json.loads((tmp_path / f"rank{r}.json").read_text())]
    assert len(seen) == IMAGES - done
    assert files(tmp_path, "cut") == files(tmp_path, "whole")
