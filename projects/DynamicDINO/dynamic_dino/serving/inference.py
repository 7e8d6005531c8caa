"""Detection from Python: images and phrases in, boxes out.

from dynamic_dino import load_detector
detections = load_detector()("photo.jpg", ["cow", "horse"])
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.structures import Instances
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..checkpoint.public import import_public
from ..checkpoint.weights import load_checkpoint
from ..config import build, load_config, split_variant, without_downloads
from ..data.image_files import find_images as find_images  # where it was before
from ..data.images import ImageLike, Size, as_array, resize_transform, to_tensor
from ..engine.checkpointing import last_checkpoint
from ..files import PACKAGE, configs_folder
from ..modeling.detector import OpenVocabularyDetector
from ..modeling.phrases import Phrases
from ..modeling.postprocess import limit_of_detections
from ..modeling.prompt import Prompt, shown
from ..modeling.vocabulary import ClassVocabulary
from ..remote import address, fetch
from ..sources import is_hub_spec
from .deploy import optimize_for_inference
from .exported import Exported, is_exported, load_exported
from .prompts import PromptLike, prompts_of_images
from .shipped import DEFAULT_MODEL, SHIPPED_MODELS, THRESHOLD, defaults_of
from .suppression import unsuppressed

NO_RUN = ", so it isn't the train.output_dir of a run"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Detector:
    """A detector ready to use; `load_detector` makes one.

    Args:
        model: maps a list of samples to a list of {"instances": Instances}.
        size: what test images are resized to, the recipe's ``inference.size``; see `TrainMapper`.
        device: where the model shall run.
        threshold: detections with lower scores are dropped, unless a call says otherwise.
        batch_size: images that are looked at together. Default: 8 on a GPU, 1 on a CPU.
        nms, nms_agnostic: of boxes of the same phrase (agnostic: of any phrases) whose intersection
            over union is more than this, the best is kept, unless a call says otherwise. Default:
            all are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        size: Size,
        device: str | torch.device = "cpu",
        threshold: float = THRESHOLD,
        batch_size: int | None = None,
        nms: float | None = None,
        nms_agnostic: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.size = size
        self.threshold = fraction(threshold, "threshold")
        self.nms = None if nms is None else fraction(nms, "nms")
        self.nms_agnostic = nms_agnostic
        _refuse_agnostic_alone(self.nms, nms_agnostic)
        self.batch_size = batch_size or (8 if self.device.type == "cuda" else 1)

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        prompts: PromptLike | Sequence[PromptLike] | None = None,
        threshold: float | None = None,
        max_detections: int | None = None,
        nms: float | None = None,
        nms_agnostic: bool | None = None,
    ) -> Instances | list[Instances]:
        """Finds the phrases in an image, or in each of a list of images.

        Args:
            images: a path, a PIL image or an array, see `data.pixels`, or a list of them.
            prompts: what to look for: "cow. horse.", ["cow", "horse"], or a
                `Prompt`; it holds for all images. Or, for a list of images, a list of lists of
                phrases (or of `Prompt`s), one for each image. None: all classes of a closed-set
                detector.
            threshold: drops detections whose score is lower; default: the detector's.
            max_detections: keeps this many per image at most, the best, of all pairs of a query
                and a phrase; default: the ``model.max_detections`` of the recipe.
            nms, nms_agnostic: see `Detector`, whose they are by default; 1 keeps all.

        Returns:
            Detectron2 `Instances` on the CPU, one for each image, best first: pred_boxes (XYXY,
            pixels of the image), scores in [0, 1], pred_classes (index of the phrase), phrases (the
            strings that were given; of a text, what stands between the full stops).

        Raises:
            FileNotFoundError, ValueError: for an image that is missing or can't be read, an empty
                prompt, another number of prompts than images, no prompt for an open vocabulary, a
                phrase that is no text, or no class of a closed set, or an option out of its range.
        """
        threshold = self.threshold if threshold is None else fraction(threshold, "threshold")
        nms = self.nms if nms is None else fraction(nms, "nms")
        agnostic = self.nms_agnostic if nms_agnostic is None else nms_agnostic
        _refuse_agnostic_alone(nms, agnostic)
        most, options = self._most(max_detections)
        prompts = self.all_classes() if prompts is None else prompts
        single = not isinstance(images, list | tuple)
        images = [images] if single else list(images)
        samples = [
            self._sample(image, prompt)
            for image, prompt in zip(images, prompts_of_images(prompts, len(images)), strict=True)
        ]
        results = []
        for start in range(0, len(samples), self.batch_size):
            with torch.inference_mode():
                outputs = self.model(samples[start : start + self.batch_size], **options)
            found = [output["instances"] for output in outputs]
            results += [_kept(instances, threshold, most, nms, agnostic) for instances in found]
        return results[0] if single else results

    def _most(self, max_detections: int | None) -> tuple[int | None, dict[str, int]]:
        """How many detections an image may have, and what is said to the model of that."""
        own = isinstance(self.model, OpenVocabularyDetector | Exported)
        limit = self.model.max_detections if own else None  # another model's is unknown
        if max_detections is None:
            return limit, {}
        most = limit_of_detections(max_detections)
        return most, {"max_detections": most} if limit is not None and most > limit else {}

    def all_classes(self) -> Prompt:
        """The prompt that asks for everything. Raises ValueError for an open vocabulary."""
        known: object = getattr(self.model, "text_encoder", None)
        if isinstance(self.model, Exported) and self.model.names:
            known = self.model
        if not isinstance(known, ClassVocabulary | Exported):
            raise ValueError(
                "nothing to look for: give phrases (predict.py: --text); only a closed-set "
                "detector, or one exported with its names, knows all that it can find"
            )
        return Prompt.from_phrases(known.names)

    def _sample(self, image: ImageLike, prompt: Prompt) -> dict:
        """What `TestMapper` makes of a record, of an image that belongs to no data set."""
        pixels = as_array(image)
        height, width = pixels.shape[:2]
        resized = resize_transform(height, width, self.size).apply_image(pixels)
        return {
            "image": to_tensor(resized),
            "image_size": tuple(resized.shape[:2]),
            "height": height,
            "width": width,
            "file_name": str(image) if isinstance(image, str | Path) else "",
            "image_id": 0,
            "prompt": prompt,
        }


def load_detector(
    model: str | Path = DEFAULT_MODEL,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    threshold: float | None = None,
    dtype: str = "float32",
    accelerate: str = "eager",
    pack: str = "auto",
    nms: float | None = None,
    nms_agnostic: bool = False,
) -> Detector:
    """A detector by the name of a shipped model, or by its recipe and weights.

    Args:
        model: one of `SHIPPED_MODELS`, the path of a LazyConfig file (.py, or the config.yaml of a
            run), the folder of a run or its address, or public weights of Grounding DINO,
            "hf:OWNER/NAME" or "hf:DIRECTORY". Default: the best of the shipped ones. Or what
            `python -m dynamic_dino.export` wrote: an .onnx or .pt2 file, or the folder for
            OpenVINO.
        weights: checkpoint, or public weights; default for a shipped model: the shipped one; for a
            run: its last. Public weights without a recipe are a model of their own.
        device: "cuda", "cpu", ...; default: a GPU if there is one.
        threshold, nms, nms_agnostic: defaults of `Detector`'s. If not given: a shipped model's own;
            of others, 0.2 and all boxes.
        dtype: "float32", "float16" or "bfloat16", what the weights are cast to, once.
        accelerate: "eager", "graph" (CUDA graphs, captured at the first image of a size) or
            "compile" (torch.compile, which takes minutes at the first image of a size).
        pack: weights packed for oneDNN, on a CPU in float32: "auto" (where a measurement of some
            tenths of a second finds that faster; what was chosen is logged), "always" or "never".

    Raises:
        FileNotFoundError, ValueError: naming the file or the argument, and what to give instead.
    """
    for name, value in (("threshold", threshold), ("nms", nms)):  # before the model is loaded
        if value is not None:
            fraction(value, name)
    if is_exported(model):
        if weights is not None or accelerate != "eager" or pack != "auto":
            raise ValueError(
                f"{model} is exported: it has its weights, and its own runtime makes it fast; "
                "leave out weights, accelerate and pack"
            )
        exported = load_exported(model, _device(device or "cpu"), dtype)
        info = exported.info
        threshold = info.threshold if threshold is None else threshold
        nms = info.nms if nms is None else nms
        size, batch = info.size, info.batch
        return Detector(exported, size, "cpu", threshold, batch, nms, nms_agnostic)
    device = _device(device)
    detector, cfg = load_model(model, weights, device, dtype, accelerate, pack)
    if isinstance(detector, OpenVocabularyDetector):
        detector.return_routings = False  # a `Detector` has no place for them
    usual = defaults_of(str(model), weights)
    threshold = usual[0] if threshold is None else threshold
    nms = usual[1] if nms is None else nms
    return Detector(
        detector, cfg.inference.size, device, threshold, nms=nms, nms_agnostic=nms_agnostic
    )


def load_model(
    model: str | Path = DEFAULT_MODEL,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    accelerate: str = "eager",
    pack: str = "auto",
) -> tuple[nn.Module, DictConfig]:
    """What `load_detector` makes a `Detector` of: the model, ready to detect, and its recipe."""
    device = _device(device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if weights is not None and is_hub_spec(weights) and str(model) in SHIPPED_MODELS:
        model, weights = weights, None
    if is_hub_spec(model):
        if weights is not None:
            raise ValueError(f"{model} brings its weights; {weights} needs a recipe as the model")
        imported = import_public(model)
        cfg = imported.config
        detector = build(cfg.model, "model")
        detector.load_state_dict(imported.state)
    else:
        cfg, weights = find_model(model, weights)
        detector = build(cfg.model, "model")
        load_checkpoint(detector, weights)
    detector.to(device)
    if isinstance(detector, OpenVocabularyDetector):  # a recipe may have a model of another kind
        optimize_for_inference(detector, DTYPES[dtype], accelerate, pack)
    return detector.eval(), cfg


def random_model(model: str | Path, pack: str = "never") -> tuple[nn.Module, DictConfig]:
    """What `load_model` returns, with random weights, always the same ones, and nothing fetched: it
    takes as long and has the same operators as a trained one, but what it finds means nothing.

    Args:
        model: see `find_recipe`, whose errors it raises.
        pack: see `load_detector`.
    """
    cfg = _load_recipe(find_recipe(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = build(without_downloads(cfg.model), "model")
    if isinstance(detector, OpenVocabularyDetector):
        optimize_for_inference(detector, torch.float32, "eager", pack)
    return detector.eval(), cfg


def find_model(model: str | Path, weights: str | Path | None) -> tuple[DictConfig, str | Path]:
    """The config and the weights of a shipped model, a run or a LazyConfig file; see
    `load_detector`, whose errors it raises."""
    config, weights = find_files(model, weights)
    return _load_recipe(config), weights


def _load_recipe(config: Path) -> DictConfig:
    cfg = load_config(config)
    if OmegaConf.select(cfg, "inference.size") is None:
        raise ValueError(
            f"{config} has no `inference.size`, so it isn't known how images are resized: import "
            "`inference` beside `model`, as in: from ..common.models.nano import inference, model"
        )
    return cfg


def find_files(model: str | Path, weights: str | Path | None) -> tuple[Path, str | Path]:
    """The files of `find_model`: recipe, weights."""
    if url := address(model):
        config, last = _find_run(url.rstrip("/"))
        return config, weights or last
    config, weights = find_recipe(model), weights or default_weights(model)
    if weights is None:
        if Path(model).is_dir():
            raise FileNotFoundError(f"{model} has no checkpoint{NO_RUN}")
        raise ValueError(
            f"{model} is a recipe without weights: give a checkpoint of it (load_detector's "
            "weights=, predict.py's --weights)"
        )
    if not is_hub_spec(weights) and not address(weights) and not Path(weights).is_file():
        raise FileNotFoundError(f"weights {weights} of {model} don't exist")
    return config, weights


def _find_run(url: str) -> tuple[Path, str]:
    """The recipe and the last weights of a run at an address."""
    try:
        config, last = fetch(f"{url}/config.yaml"), fetch(f"{url}/last_checkpoint")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{NO_RUN}") from None
    return config, f"{url}/{last.read_text().strip()}"


def find_recipe(model: str | Path) -> Path:
    """The recipe of a shipped model or of a run, by its folder; of a LazyConfig file, that file.

    Raises:
        FileNotFoundError, ValueError: a folder that is no run's; a name that is no model's.
    """
    if str(model) in SHIPPED_MODELS:
        return configs_folder() / SHIPPED_MODELS[str(model)].config
    if Path(model).is_dir():
        config = Path(model) / "config.yaml"
        if not config.is_file():
            raise FileNotFoundError(f"{model} has no config.yaml{NO_RUN}")
        return config
    if split_variant(model)[0].suffix in (".py", ".yaml", ".yml"):
        return Path(model)
    if is_hub_spec(model):
        raise ValueError(f"{model} are weights: give the recipe of a model instead")
    near = difflib.get_close_matches(str(model), SHIPPED_MODELS, n=1, cutoff=0.3)
    raise ValueError(
        f"unknown model {str(model)!r}"
        + (f", did you mean {near[0]!r}?" if near else ":")
        + f" There are {', '.join(SHIPPED_MODELS)}, and public ones (hf:OWNER/NAME); any other "
        "is given by its LazyConfig file (.py or .yaml) and weights"
    )


def default_weights(model: str | Path) -> Path | None:
    """The file of weights that a shipped model or the folder of a run has, None for any other."""
    if str(model) in SHIPPED_MODELS:
        return PACKAGE / "weights" / SHIPPED_MODELS[str(model)].weights
    return last_checkpoint(model) if Path(model).is_dir() else None


def detect_each(
    detector: Detector,
    images: Sequence[ImageLike],
    prompts: Sequence[PromptLike],
    *options: object,
    errors: tuple[type[Exception], ...] = (ValueError,),
) -> list[Instances | Exception]:
    """The detections of each image or, where the model refuses one, the error that says why: one
    image, or its text, costs no other of the batch.

    Args:
        options: `Detector.__call__`'s, behind images and prompts.
        errors: what a refusal is; others are raised.
    """
    try:
        return detector(list(images), list(prompts), *options)
    except errors as error:
        if len(images) == 1:
            return [error]
    return [
        result
        for image, prompt in zip(images, prompts, strict=True)
        for result in detect_each(detector, [image], [prompt], *options, errors=errors)
    ]


def detection_records(detections: Instances) -> list[dict]:
    """Detections as plain data: phrase, score, box [x0, y0, x1, y1] in pixels of the image; of a
    followed video (`Tracker`) also track, the object's number, or None."""
    records: list[dict] = [
        {"phrase": phrase, "score": round(score, 4), "box": [round(v, 1) for v in box]}
        for phrase, score, box in zip(
            detections.phrases,
            detections.scores.tolist(),
            detections.pred_boxes.tensor.tolist(),
            strict=True,
        )
    ]
    if detections.has("track_ids"):
        for record, track in zip(records, detections.track_ids.tolist(), strict=True):
            record["track"] = track or None
    return records


def _kept(
    found: Instances, threshold: float, most: int | None, nms: float | None, agnostic: bool
) -> Instances:
    """The best detections as ordinary tensors on the CPU. Outside of inference mode, indexing
    makes such of what the model returned."""
    if not torch.isfinite(found.scores).all():
        raise ValueError("the model's scores are not finite: are its weights damaged?")
    phrases = Phrases(found.phrases)
    found = Instances(
        found.image_size,
        pred_boxes=found.pred_boxes,
        scores=found.scores,
        pred_classes=found.pred_classes,
    ).to("cpu")
    found.phrases = phrases
    order = found.scores.argsort(descending=True, stable=True)
    order = order[found.scores[order] >= threshold]
    if nms is not None:
        order = order[unsuppressed(found[order], nms, agnostic)]
    return found[order[:most]]


def fraction(value: float, name: str) -> float:
    """Raises ValueError for what is no number from 0 to 1, naming the option."""
    try:
        if isinstance(value, str | bytes | bool):  # of which float() would take some
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number from 0 to 1, not {shown(value)}") from None
    if not 0 <= number <= 1:
        raise ValueError(f"{name} {number:g} is not between 0 and 1")
    return number


def _refuse_agnostic_alone(nms: float | None, agnostic: bool) -> None:
    if agnostic and nms is None:
        raise ValueError(
            "nms_agnostic needs nms, the overlap from which boxes are dropped, as in nms=0.7"
        )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no GPU: use cpu")
    return device
