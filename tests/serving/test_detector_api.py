"""`Detector` and `load_detector`: images, prompts, resizing, filtering, and every wrong input."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from dynamic_dino.data.datasets import load_datasets, register_coco_json
from dynamic_dino.data.image_files import find_images, left_out, search_images
from dynamic_dino.data.mapper import TestMapper
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.serving import inference
from dynamic_dino.serving.inference import Detector, load_detector
from dynamic_dino.serving.shipped import THRESHOLD, ShippedModel
from helpers.seeds import examples, fresh_rng
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file


class OneBoxPerPhrase(torch.nn.Module):
    """Finds phrase p in the p-th tenth of the image, with score 0.95 - p / 10, worst first."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, batch):
        assert not self.training and torch.is_inference_mode_enabled()
        self.batches.append(batch)
        outputs = []
        for sample in batch:
            h, w = sample["height"], sample["width"]
            ids = torch.arange(len(sample["prompt"].phrases)).flip(0)
            left = ids * w / 10
            boxes = torch.stack([left, 0 * left, left + w / 10, 0 * left + h], 1)
            result = Instances((h, w))
            result.pred_boxes, result.scores = Boxes(boxes), 0.95 - ids / 10
            result.pred_classes = ids
            result.phrases = [sample["prompt"].phrases[i] for i in ids]
            outputs.append({"instances": result})
        return outputs


@pytest.fixture
def detector():
    return Detector(OneBoxPerPhrase(), 32, batch_size=2)


def noise(h=48, w=64):
    return fresh_rng().integers(0, 256, (h, w, 3), dtype=np.uint8)


def test_one_image(detector):
    found = detector(noise(), "red panda. windmill.")
    assert found.image_size == (48, 64)
    assert found.phrases == ["red panda", "windmill"] and found.pred_classes.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx([0.95, 0.85])
    assert found.pred_boxes.tensor[1].tolist() == pytest.approx([6.4, 0, 12.8, 48])


def test_the_sample_is_the_test_mappers(tmp_path):
    """Evaluation and users must look at the same pixels, whatever the shape of the image."""
    seed = int(fresh_rng().integers(10**6))
    json_file = write_drawn_dataset(tmp_path, 6, size=90, seed=seed)
    register_coco_json("detector_api_drawn", json_file, json_file.parents[1] / "train")
    for size in (64, (48, 80), 200):
        detector = Detector(OneBoxPerPhrase(), size)
        mapper = TestMapper("detector_api_drawn", size)
        for record in load_datasets("detector_api_drawn"):
            expected = mapper(record)
            detector(record["file_name"], expected["prompt"])
            [sample] = detector.model.batches[-1]
            assert torch.equal(sample["image"], expected["image"])
            for key in ("image_size", "height", "width", "file_name", "prompt"):
                assert sample[key] == expected[key], key


def test_threshold_and_max_detections(detector):
    phrases = [f"thing {i}" for i in range(9)]
    assert len(detector(noise(), phrases)) == 8  # 0.95 ... 0.25, above the default of 0.2
    assert detector(noise(), phrases, threshold=0.8).phrases == phrases[:2]
    assert detector(noise(), phrases, threshold=0, max_detections=4).phrases == phrases[:4]
    assert len(detector(noise(), phrases, threshold=1.0)) == 0


def test_several_images_share_a_prompt_or_have_their_own(detector):
    images = [noise(), noise(30, 90), noise(90, 30)]
    for prompt in ("mug. acorn.", ["mug", "acorn"], Prompt.parse("mug. acorn.")):
        assert [r.phrases for r in detector(images, prompt)] == [["mug", "acorn"]] * 3
    assert [len(b) for b in detector.model.batches[:2]] == [2, 1], "batch_size"
    assert detector.model.batches[0][0]["prompt"] is detector.model.batches[1][0]["prompt"]
    own = detector(images, [["mug"], ["acorn", "bell"], Prompt.parse("cat.")])
    assert [r.phrases for r in own] == [["mug"], ["acorn", "bell"], ["cat"]]
    assert [r.image_size for r in own] == [(48, 64), (30, 90), (90, 30)]
    assert [r.phrases for r in detector(images[:1], [["mug", "cat"]])] == [["mug", "cat"]]
    assert detector([], "mug") == []


def test_paths_pil_images_and_arrays_are_the_same(detector, tmp_path):
    image = noise()
    Image.fromarray(image).save(tmp_path / "photo.png")
    inputs = [image, Image.fromarray(image), tmp_path / "photo.png", str(tmp_path / "photo.png")]
    detector(inputs, "mug")
    samples = [sample for batch in detector.model.batches for sample in batch]
    for sample in samples[1:]:
        assert torch.equal(sample["image"], samples[0]["image"])
    assert samples[3]["file_name"].endswith("photo.png")


def test_detections_can_be_filtered_the_detectron2_way(detector):
    found = detector(noise(), ["a", "b", "c", "d"])
    assert found[found.scores > 0.8].phrases == ["a", "b"]
    assert found[torch.tensor([3, 0])].phrases == ["d", "a"]
    assert found[1].phrases == ["b"] and found[1:3].phrases == ["b", "c"]
    assert found[-1].phrases == ["d"]
    both = Instances.cat([found, found])
    assert both.phrases == ["a", "b", "c", "d"] * 2
    assert both[both.scores > 0.8].phrases == ["a", "b"] * 2
    assert both[torch.tensor([0, 6])].phrases == ["a", "c"]


def test_results_are_ordinary_tensors(detector):
    found = detector([noise()] * 3, ["a", "b"])[2]
    assert not any(v.is_inference() for v in (found.scores, found.pred_boxes.tensor))
    found.pred_boxes.tensor += 10
    found.pred_boxes.scale(2, 2)
    found.scores[0] = 1
    shift = torch.zeros(2, 4, requires_grad=True)
    (found.pred_boxes.tensor * shift * found.scores[:, None]).sum().backward()


def test_names_come_back_as_they_were_given(detector):
    names = ["No. 2 pencil", " St. Bernard", "what?", "red  panda", "PERCH", "鲈"]
    found = detector(noise(), names, threshold=0.0)
    assert found.phrases == [names[i] for i in found.pred_classes] == names
    assert detector(noise(), "No. 2 pencil. red  panda").phrases == ["No", "2 pencil", "red  panda"]
    assert detector(noise(), (name for name in names[:2])).phrases == names[:2]


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("threshold", float("nan"), "threshold nan is not between 0 and 1"),
        ("threshold", 1.5, "threshold 1.5 is not between"),
        ("threshold", "0.5", r"threshold must be a number from 0 to 1, not '0.5' \(str\)"),
        ("nms", -1, "nms -1 is not between"),
        ("nms", [0.5], "nms must be a number"),
        ("max_detections", 0, "max_detections must be a whole number of at least 1, not 0"),
        ("max_detections", 2.5, r"not 2.5 \(float\)"),
        ("max_detections", True, r"not True \(bool\)"),
        ("max_detections", "9", r"not '9' \(str\)"),
        ("nms_agnostic", True, "nms_agnostic needs nms"),
    ],
)
def test_options_out_of_their_range_are_named(detector, name, value, error):
    with pytest.raises(ValueError, match=error):
        detector("nowhere.jpg", "mug", **{name: value})
    if name != "max_detections":
        with pytest.raises(ValueError, match=error):
            Detector(detector.model, 32, **{name: value})


class Twins(OneBoxPerPhrase):
    """Each phrase twice, a bit apart; all phrases at one place."""

    def forward(self, batch):
        outputs = super().forward(batch)
        for output in outputs:
            once = output["instances"]
            once.pred_boxes.tensor[:] = torch.tensor([5.0, 5, 45, 45])
            again = Instances(once.image_size, **once.get_fields())
            again.scores = once.scores - 0.01
            again.pred_boxes = Boxes(once.pred_boxes.tensor + 2)
            output["instances"] = Instances.cat([once, again])
        return outputs


def test_non_maximum_suppression():
    detector = Detector(Twins(), 32)
    for names, once in ((["a", "b", "c"], ["a", "b", "c"]), (["a", "b", "a"], ["a", "b"])):
        assert len(detector(noise(), names)) == len(detector(noise(), names, nms=1)) == 6
        found = detector(noise(), names, nms=0.7)
        assert found.phrases == once and (found.scores.diff() < 0).all()
        assert len(detector(noise(), names, nms=0.9)) == 2 * len(once), "the overlap is 0.82"
        assert detector(noise(), names, nms=0.7, nms_agnostic=True).phrases == ["a"]
        assert detector(noise(), names, nms=0.7, max_detections=2).phrases == ["a", "b"]
    always = Detector(Twins(), 32, nms=0.7, nms_agnostic=True)
    assert len(always(noise(), "a. b.")) == 1
    assert always(noise(), "a. b.", nms_agnostic=False).phrases == ["a", "b"]


@pytest.mark.parametrize(
    "image, error, message",
    [
        ("nowhere.jpg", FileNotFoundError, "image nowhere.jpg does not exist"),
        ("/", FileNotFoundError, "is a folder"),
        (np.zeros((4, 4, 3), np.float32), ValueError, "not float32"),
        (torch.zeros(3, 4, 4), ValueError, "not Tensor"),
    ],
)
def test_bad_images_are_named(detector, image, error, message):
    with pytest.raises(error, match=message):
        detector(image, "mug")


@pytest.mark.parametrize("fault", ["text", "cut", "empty"])
def test_damaged_files_are_named(detector, tmp_path, fault):
    path = tmp_path / "photo.jpg"
    Image.fromarray(noise(200, 200)).save(path)
    path.write_bytes({"text": b"hello", "cut": path.read_bytes()[:3000], "empty": b""}[fault])
    with pytest.raises(ValueError, match="photo.jpg can't be read"):
        detector(path, "mug")


def test_bad_prompts_are_named(detector):
    for empty in ("", " . ", []):
        with pytest.raises(ValueError, match="empty prompt"):
            detector(noise(), empty)
    with pytest.raises(ValueError, match="phrase 1 of the prompt"):
        detector(noise(), ["mug", " "])
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        detector([noise()] * 3, [["mug"], ["acorn"]])
    for wrong in (b"mug", bytearray(b"mug"), 7, {0: "mug"}, {"mug": 0}, torch.tensor(3)):
        with pytest.raises(ValueError, match="a prompt must be a text, a list of phrases"):
            detector(noise(), wrong)


odd = st.one_of(
    st.none(), st.integers(), st.floats(), st.binary(), st.booleans(), st.lists(st.text())
)


@settings(max_examples=examples(12), deadline=None)
@given(odd, st.integers(0, 2))
def test_odd_phrases_are_refused_by_place_and_kind(value, place):
    detector, names, images = Detector(OneBoxPerPhrase(), 32), ["mug", "bell"], [noise()] * 3
    names.insert(place, value)
    with pytest.raises(ValueError, match=rf"phrase {place} .*\({type(value).__name__}\)"):
        detector(noise(), names)
    with pytest.raises(ValueError, match=rf"prompt of image 1: phrase {place} of .* is "):
        detector(images, [["mug"], names, ["bell"]])
    if not isinstance(value, list):
        own: list = [["mug"], Prompt.parse("bell."), "acorn."]
        own[place] = value
        with pytest.raises(ValueError, match=f"the prompt of image {place}: a prompt must be"):
            detector(images, own)


def test_scores_that_are_not_finite_stop(detector):
    class Broken(OneBoxPerPhrase):
        def forward(self, batch):
            outputs = super().forward(batch)
            outputs[0]["instances"].scores[0] = float("nan")
            return outputs

    with pytest.raises(ValueError, match="not finite"):
        Detector(Broken(), 32)(noise(), "mug")


# ---- load_detector ------------------------------------------------------------------------------

RECIPE = """
from detectron2.config import LazyCall as L
from torch import nn

model = L(nn.Linear)(in_features=2, out_features={size})
inference = dict(size=24)
dataloader = dict()
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE.format(size=3))
    weights = {"weight": torch.randn(3, 2), "bias": torch.randn(3)}
    save_file(weights, tmp_path / "weights.safetensors")
    return tmp_path / "recipe.py", tmp_path / "weights.safetensors", weights


def test_a_recipe_and_its_weights(recipe):
    config, path, weights = recipe
    detector = load_detector(config, path, device="cpu", threshold=0.7)
    assert torch.equal(detector.model.weight, weights["weight"])
    assert detector.threshold == 0.7 and not detector.model.training
    assert detector.size == 24


def test_shipped_models_take_their_own_weights_or_given_ones(recipe, monkeypatch):
    config, path, weights = recipe
    shipped = ShippedModel(str(config), str(path), threshold=0.35, nms=0.8)
    monkeypatch.setitem(inference.SHIPPED_MODELS, "tiny", shipped)
    own = load_detector("tiny", device="cpu")
    assert torch.equal(own.model.bias, weights["bias"])
    assert (own.threshold, own.nms) == (0.35, 0.8), "they were measured on these weights"
    asked = load_detector("tiny", device="cpu", threshold=0.0, nms=1)
    assert (asked.threshold, asked.nms) == (0, 1)
    other = path.with_name("other.safetensors")
    save_file({**weights, "bias": torch.zeros(3)}, other)
    others = load_detector("tiny", other, device="cpu")
    assert not others.model.bias.any()
    assert (others.threshold, others.nms) == (THRESHOLD, None)


def test_unknown_models_and_files_are_named(recipe, monkeypatch):
    config, path, _ = recipe
    with pytest.raises(ValueError, match="'nano16', did you mean 'nano-x16'.*nano-dense, nano-x16"):
        load_detector("nano16")
    with pytest.raises(ValueError, match="unknown model 'zzz': There are nano-dense"):
        load_detector("zzz")
    with pytest.raises(ValueError, match="recipe without weights"):
        load_detector(config)
    with pytest.raises(FileNotFoundError, match="missing.pth of .*recipe.py don't exist"):
        load_detector(config, config.with_name("missing.pth"))
    with pytest.raises(ValueError, match="recipes.py does not exist; did you mean .*recipe.py"):
        load_detector(config.with_name("recipes.py"), path)
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        load_detector(config, path, device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        load_detector(config, path, device="cuda:0")

    config.write_text(RECIPE.format(size=5))
    with pytest.raises(ValueError, match="weights.safetensors is of another architecture"):
        load_detector(config, path, device="cpu")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="weights.safetensors is corrupt"):
        load_detector(config, path, device="cpu")
    config.write_text("model = dict()\ndataloader = dict()\n")
    with pytest.raises(ValueError, match="recipe.py has no `inference.size`"):
        load_detector(config, path, device="cpu")


# ---- find_images --------------------------------------------------------------------------------


def test_find_images(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt", "sub/c.jpg", "sub/deep/d.webp", "odd[1].jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*paths):
        return [p.relative_to(tmp_path).as_posix() for p in find_images(paths)]

    assert names(tmp_path) == ["a.PNG", "b.jpg", "odd[1].jpg"]
    assert names(tmp_path / "sub" / "c.jpg", tmp_path / "b.jpg") == ["sub/c.jpg", "b.jpg"]
    assert names(f"{tmp_path}/**/*.jpg") == ["b.jpg", "odd[1].jpg", "sub/c.jpg"]
    assert names(tmp_path / "odd[1].jpg") == ["odd[1].jpg"]
    assert names(tmp_path / "b.jpg", f"{tmp_path}/sub/../b.jpg", tmp_path)[0] == "b.jpg"
    assert names(tmp_path / "b.jpg", tmp_path).count("b.jpg") == 1
    (tmp_path / "._b.jpg").touch()
    (tmp_path / "c.heic.txt").touch()
    (tmp_path / "sub/broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    taken, left = search_images([tmp_path, f"{tmp_path}/sub/*"])
    assert taken == find_images([tmp_path, f"{tmp_path}/sub/*"]) and len(taken) == 5
    assert left_out(left) == (
        "left out: 2 .txt (c.heic.txt, notes.txt), "
        f"1 folder (sub; '{tmp_path}/sub/**/*' takes the images in it)"
    )
    assert names(tmp_path / "notes.txt") == ["notes.txt"], "a file that is named is taken"
    with pytest.raises(FileNotFoundError, match="z.jpg does not exist"):
        find_images([tmp_path / "z.jpg"])
    with pytest.raises(FileNotFoundError, match="matches no image"):
        find_images([f"{tmp_path}/*.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty contains no image"):
        find_images([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="deep contains no image .*1 .svg .*convert it"):
        (tmp_path / "sub/deep/d.webp").rename(tmp_path / "sub/deep/d.svg")
        find_images([tmp_path / "sub/deep"])
    with pytest.raises(FileNotFoundError, match="http.* is an address, not a file: download"):
        find_images(["https://example.com/a.jpg"])
    with pytest.raises(FileNotFoundError, match="does not exist; .*/sub/c.jpg does"):
        find_images([f"{tmp_path}\\sub\\c.jpg"])
