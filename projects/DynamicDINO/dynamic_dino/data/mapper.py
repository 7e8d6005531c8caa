"""From a record to what the model reads: image (or cached features), prompt, boxes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances

from ..modeling.prompt import Prompt
from .datasets import get_metadata, unasked_classes
from .feature_cache import FeatureCache
from .images import Size, read_image, resize_transform, to_tensor
from .prompts import PromptSampler, caption_phrases, evaluation_prompt

Record = dict[str, Any]
Names = str | Sequence["Names"]


class TrainMapper:
    """A record and a random generator -> an augmented sample with a sampled prompt.

    dataset        name of the data set whose records come, for its class names, or a list of
                   names or of such lists
    size           int: the longest edge is scaled to it; (short, long): the shortest edge is
                   scaled to `short` unless the longest would pass `long`; None: as `augmentations`
                   leave it
    augmentations  one or several of Detectron2's, applied before the resizing; those that choose a
                   scale themselves (`detr_augmentations`, `large_scale_jitter`) want size=None
    flip           probability of a horizontal flip; captions that say left or right aren't flipped
    max_phrases, min_phrases   see `PromptSampler`; max_phrases=None: all classes of the data set,
                   in their order, as a closed set is trained
    features       cached backbone features to be used in the place of the image, or the folder
                   of the cache; `size` must be its canvas and `augmentations` empty
    min_box_size   boxes narrower or lower than this, in pixels of the network, are left out
    phrase_prompts   probability that the prompt of a caption is, in its place, its phrases in
                   random order, as in detection; phrase_dropout: probability that one of them is
                   left out, see `caption_phrases`

    Captions get no negatives from elsewhere, which nobody does (mmdetection's vg_aug): what else
    the picture shows is unknown.

    The sample: "image" uint8 [3, h, w] RGB, or "features" {level: float16 [C, H, W]};
    "image_size" (h, w); "prompt"; "instances" with gt_boxes (XYXY, pixels of the network) and
    gt_classes (index into the phrases of the prompt); "height", "width", "file_name", "image_id";
    "caption" of grounding records.
    """

    def __init__(
        self,
        dataset: Names,
        size: Size,
        *,
        augmentations: T.Augmentation | Sequence[T.Augmentation] = (),
        flip: float = 0.5,
        max_phrases: int | None = 80,
        min_phrases: int | None = None,
        features: FeatureCache | str | None = None,
        min_box_size: float = 1.0,
        phrase_prompts: float = 0.0,
        phrase_dropout: float = 0.0,
    ) -> None:
        for option, value in (
            ("phrase_prompts", phrase_prompts),
            ("phrase_dropout", phrase_dropout),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{option}={value} of the mapper must be a probability")
        if isinstance(augmentations, T.Augmentation):
            augmentations = [augmentations]
        features = _open_features(features, size)
        if features is not None and len(augmentations):
            raise ValueError(
                "cached features can't be augmented: leave dataloader.train.mapper.augmentations "
                "empty or features unset"
            )
        self.samplers, self.fixed = {}, {}
        for name in _flat_names(dataset):
            metadata = get_metadata(name)
            names = metadata.thing_classes
            novel = getattr(metadata, "novel", None) or []
            self.samplers[name] = PromptSampler(
                names,
                max(len(names), 1) if max_phrases is None else max_phrases,
                min_phrases=min_phrases,
                near_synonyms=getattr(metadata, "near_synonyms", None),
                never_negative=[
                    *(i for i, is_novel in enumerate(novel) if is_novel),
                    *unasked_classes(name),
                ],
            )
            if max_phrases is None and names:
                self.fixed[name] = Prompt.from_phrases(names)
        self.size = size
        self.augmentation = T.AugmentationList([*augmentations, *resize_augmentations(size)])
        self.flip = flip
        self.features = features
        self.min_box_size = min_box_size
        self.phrase_prompts = phrase_prompts
        self.phrase_dropout = phrase_dropout

    def __call__(self, record: Record, rng: np.random.Generator) -> dict:
        boxes, classes = _boxes_and_classes(record)
        sample = _describe(record)
        flip = rng.random() < self.flip and not _mentions_sides(record)
        if self.features is None:
            # Detectron2's augmentations draw from numpy's global generator
            with numpy_seed(int(rng.integers(2**32))):
                inputs = T.AugInput(read_image(record), boxes=boxes)
                self.augmentation(inputs)
            image, boxes = inputs.image, inputs.boxes
            if flip:
                mirror = T.HFlipTransform(image.shape[1])
                image, boxes = mirror.apply_image(image), mirror.apply_box(boxes)
            sample["image"] = to_tensor(image)
            sample["image_size"] = tuple(image.shape[:2])
        else:
            resize = resize_transform(record["height"], record["width"], self.size)
            boxes = resize.apply_box(boxes)
            flip = flip and self.features.can_flip(resize.new_w)
            if flip:
                boxes = T.HFlipTransform(resize.new_w).apply_box(boxes)
            sample["features"] = self.features.load(record, flip=flip)
            sample["image_size"] = (resize.new_h, resize.new_w)

        height, width = sample["image_size"]
        boxes = np.clip(boxes, 0, [width, height, width, height])
        keep = ((boxes[:, 2:] - boxes[:, :2]) >= self.min_box_size).all(axis=1)
        boxes, classes = boxes[keep], classes[keep]
        if "caption" in record:
            sample["prompt"], position = self._caption_prompt(record, classes, rng)
        else:
            sampler = _sampler_of(record, self.samplers)
            if self.fixed:
                phrases = range(len(sampler.names))
                sample["prompt"] = self.fixed[_dataset_of(record, self.samplers)]
            else:
                present = [annotation["category_id"] for annotation in record["annotations"]]
                phrases = sampler(classes.tolist(), present, rng)
                if not len(phrases):
                    raise ValueError(
                        f"image {record['file_name']}: none of its boxes is left at the size of "
                        "the network, and no name is known to be absent from it: remove it, or "
                        "train at a larger size"
                    )
                sample["prompt"] = Prompt.from_phrases([sampler.names[i] for i in phrases])
            position = {c: i for i, c in enumerate(phrases)}
        sample["instances"] = _instances(boxes, classes, position, sample["image_size"])
        return sample

    def _caption_prompt(
        self, record: Record, classes: np.ndarray, rng: np.random.Generator
    ) -> tuple[Prompt, dict[int, int]]:
        """The caption, or its phrases; and the place of each class of the record in it."""
        caption, spans = record["caption"], record["phrase_spans"]
        # drawn only where it is wanted: runs without it keep their random numbers
        if self.phrase_prompts and rng.random() < self.phrase_prompts:
            phrases = caption_phrases(caption, spans, classes.tolist(), self.phrase_dropout, rng)
            if phrases:
                position = {c: i for i, said in enumerate(phrases.values()) for c in said}
                return Prompt.from_phrases(list(phrases)), position
        return Prompt.from_caption(caption, spans), {i: i for i in range(len(spans))}


class TestMapper:
    """A record -> a sample without augmentation and with a fixed prompt.

    prompt_names  "annotated": the classes of the data set, in its order, the same `Prompt` object
                  each time, without the `unasked_classes` of own data, for which AP isn't defined;
                  "all": with them; an int n: the classes of the image and negatives up to n names,
                  the same for an image in every run (federated evaluation)
    Others as in `TrainMapper`. The sample also has "prompt_classes", the class of the data set for
    each phrase of the prompt; "instances" holds the boxes that aren't crowds.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    def __init__(
        self,
        dataset: Names,
        size: Size,
        *,
        prompt_names: str | int = "annotated",
        features: FeatureCache | str | None = None,
    ) -> None:
        federated = isinstance(prompt_names, int) and prompt_names > 0
        if not federated and prompt_names not in ("annotated", "all"):
            raise ValueError(
                f"prompt_names={prompt_names!r}: use 'annotated', 'all' or a positive number"
            )
        features = _open_features(features, size)
        self.samplers, self.fixed, self.asked = {}, {}, {}
        for name in _flat_names(dataset):
            metadata = get_metadata(name)
            names = metadata.thing_classes
            related = getattr(metadata, "near_synonyms", None)
            unasked = [] if prompt_names == "all" else unasked_classes(name)
            self.samplers[name] = PromptSampler(
                names, max(len(names), 1), near_synonyms=related, never_negative=unasked
            )
            # of a data set without a single box, all are asked for
            asked = sorted({*range(len(names))} - {*unasked}) or list(range(len(names)))
            if not federated and asked:
                self.asked[name] = asked
                self.fixed[name] = Prompt.from_phrases([names[i] for i in asked])
        self.size = size
        self.prompt_names = prompt_names
        self.features = features
        self._last: tuple = (None, None)  # the last image, and of which record

    def __call__(self, record: Record) -> dict:
        sample = _describe(record)
        resize = resize_transform(record["height"], record["width"], self.size)
        if self.features is None:
            sample["image"] = self._image(record, resize)
        else:
            sample["features"] = self.features.load(record)
        sample["image_size"] = (resize.new_h, resize.new_w)
        boxes, classes = _boxes_and_classes(record)
        phrases = self.asked_of(record)
        if "caption" in record:
            sample["prompt"] = Prompt.from_caption(record["caption"], record["phrase_spans"])
        elif self.fixed:
            sample["prompt"] = self.fixed[_dataset_of(record, self.samplers)]
        else:
            names = _sampler_of(record, self.samplers).names
            sample["prompt"] = Prompt.from_phrases([names[i] for i in phrases])
        sample["prompt_classes"] = phrases
        position = {c: i for i, c in enumerate(phrases)}
        sample["instances"] = _instances(
            resize.apply_box(boxes), classes, position, sample["image_size"]
        )
        return sample

    def asked_of(self, record: Record) -> list[int]:
        """The classes of its data set, of a caption the phrases, that a record is asked for, in the
        order of the prompt."""
        if "caption" in record:
            return list(range(len(record["phrase_spans"])))
        if self.fixed:
            return list(self.asked[_dataset_of(record, self.samplers)])
        present = [a["category_id"] for a in record.get("annotations", ())]
        sampler = _sampler_of(record, self.samplers)
        return evaluation_prompt(sampler, present, self.prompt_names, record["image_id"])

    def _image(self, record: Record, resize: T.ResizeTransform) -> torch.Tensor:
        """uint8 [3, h, w]. Records of one file after each other, as referring expressions are,
        share the tensor: it is decoded once, and the detector looks at it once."""
        of = record["file_name"], record["height"], record["width"]
        if self._last[0] != of:
            self._last = of, to_tensor(resize.apply_image(read_image(record)))
        return self._last[1]


# ---- augmentations ------------------------------------------------------------------------------


class Resize(T.Augmentation):
    """`resize_transform` as an augmentation."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return resize_transform(*image.shape[:2], self.size)


def resize_augmentations(size: Size) -> list[T.Augmentation]:
    return [] if size is None else [Resize(size)]


def color_jitter(
    brightness: float = 0.3, contrast: float = 0.3, saturation: float = 0.3
) -> T.AugmentationList:
    """Each strength s scales its property by a factor uniform in [1 - s, 1 + s]."""
    return T.AugmentationList(
        [
            T.RandomBrightness(1 - brightness, 1 + brightness),
            T.RandomContrast(1 - contrast, 1 + contrast),
            T.RandomSaturation(1 - saturation, 1 + saturation),
        ]
    )


def detr_augmentations(
    scales: Sequence[int] = tuple(range(480, 801, 32)), max_size: int = 1333
) -> T.AugmentationList:
    """DETR's multi-scale training (use with ``size=None``): the shortest edge is one of `scales`;
    half of the images are first resized to 400, 500 or 600 and cropped to 384-600 pixels."""
    crop = T.AugmentationList(
        [
            T.ResizeShortestEdge([400, 500, 600], sample_style="choice"),
            T.RandomCrop("absolute_range", (384, 600)),
        ]
    )
    resize = T.ResizeShortestEdge(list(scales), max_size, sample_style="choice")
    return T.AugmentationList([T.RandomApply(crop, prob=0.5), resize])


def large_scale_jitter(
    size: int, min_scale: float = 0.5, max_scale: float = 1.5
) -> T.AugmentationList:
    """Zooms out or in, then cuts to at most `size` x `size` (use with ``size=None``)."""
    return T.AugmentationList(
        [
            T.ResizeScale(min_scale, max_scale, size, size),
            T.FixedSizeCrop((size, size), pad=False),
        ]
    )


@contextlib.contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """Seeds numpy's global generator and puts its state back afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


# ---- parts of a sample --------------------------------------------------------------------------


def _flat_names(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else [n for part in names for n in _flat_names(part)]


def _describe(record: Record) -> dict:
    keys = ("file_name", "image_id", "height", "width", "caption")
    return {key: record[key] for key in keys if key in record}


def _boxes_and_classes(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """XYXY float64 [N, 4] in pixels of the original image, int64 [N]; crowds left out."""
    annotations = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    classes = [a["category_id"] for a in annotations]
    return (
        np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        np.asarray(classes, dtype=np.int64),
    )


def _instances(
    boxes: np.ndarray, classes: np.ndarray, position: dict[int, int], image_size: tuple[int, int]
) -> Instances:
    """Relabels classes as positions in the prompt; boxes of classes that it lacks are dropped."""
    keep = [i for i, c in enumerate(classes.tolist()) if c in position]
    instances = Instances(image_size)
    instances.gt_boxes = Boxes(torch.as_tensor(boxes[keep], dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor([position[int(classes[i])] for i in keep]).long()
    return instances


def _dataset_of(record: Record, samplers: dict[str, PromptSampler]) -> str:
    if len(samplers) == 1:
        return next(iter(samplers))
    name = record.get("dataset_name")
    if name not in samplers:
        raise ValueError(
            f"image {record['file_name']!r} comes from data set {name!r}, but the mapper knows "
            f"{', '.join(samplers)}: name the same data sets in `dataset` and `mapper.dataset`"
        )
    return name


def _sampler_of(record: Record, samplers: dict[str, PromptSampler]) -> PromptSampler:
    return samplers[_dataset_of(record, samplers)]


def _mentions_sides(record: Record) -> bool:
    return bool(re.search(r"\b(left|right)", record.get("caption", ""), re.IGNORECASE))


def _open_features(features: FeatureCache | str | None, size: Size) -> FeatureCache | None:
    if features is None:
        return None
    if isinstance(features, str):
        features = FeatureCache(features)
    if size != features.canvas:
        raise ValueError(
            f"the mapper's size is {size}, but the features in {str(features.root)!r} were cached "
            f"at {features.canvas}: use the same size or cache them again"
        )
    return features
