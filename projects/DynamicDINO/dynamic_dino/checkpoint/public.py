"""Grounding DINO's public weights as ours, and ours as a directory of transformers.

Sources are a directory of transformers or "hf:OWNER/NAME" (Grounding DINO, MM-Grounding-DINO), .pth
files with the names of IDEA's original code or of mmdetection, and checkpoints of ours. Each tensor
is accounted for.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig
from tabulate import tabulate
from torch import Tensor

from ..files import configs_folder
from ..modeling.detector import OpenVocabularyDetector
from ..sources import model_directory
from .files import check_tensors, read_directory, read_state_dict, write_safetensors
from .mmdetection_names import as_idea, is_mmdetection
from .transformers_config import detector_config, read_config, transformers_config
from .weight_names import UNUSED, canonical_name, their_names

SIZES = {96: "tiny", 128: "base"}  # by the width of the first stage


@dataclass
class Account:
    """What became of the weights of a source. `loaded`, `converted` and `missing` are names of
    ours; `copies` (of shared heads), `unused` (by the architecture) and `unexpected` are theirs."""

    loaded: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def table(self) -> str:
        rows = [(kind, len(names), names[0] if names else "") for kind, names in vars(self).items()]
        return tabulate(rows, headers=("", "tensors", "first"))


class IncompleteError(ValueError):
    """A source is not the whole of a model, or more than it."""

    def __init__(self, message: str, account: Account) -> None:
        super().__init__(message)
        self.account = account


@dataclass
class Imported:
    """Weights under our names, the account of them, and the config of the detector they fit."""

    state: dict[str, Tensor]
    account: Account
    config: DictConfig


def import_public(source: str | Path, config: DictConfig | None = None) -> Imported:
    """Reads public weights.

    Args:
        source: "hf:OWNER/NAME", a directory of transformers, or a file with the names of IDEA's
            code, mmdetection or ours.
        config: of the dense detector, with `model`; default: what the directory's config.json says,
            or, for a file, the recipe of Swin-T or Swin-B with the heads that it has.

    Raises:
        FileNotFoundError: the source is not there, or the hub can't be reached.
        ValueError: it is corrupt, holds more than weights, or is not the whole of a model of this
            architecture (`IncompleteError`).
    """
    file, found = Path(source), None
    if file.is_file():
        state = read_state_dict(file)
    else:
        folder = model_directory(source)
        found = detector_config(read_config(folder), folder) if config is None else None
        state = read_directory(folder)
    if is_mmdetection(state):
        state = as_idea(state)
    state, account = tidy(state, source)
    layout = layout_of(state)
    if layout is None:
        raise ValueError(
            f"{source} holds no weights of Grounding DINO under the names of transformers, of "
            f"IDEA's code, of mmdetection or of this project; it has {', '.join(list(state)[:3])}"
        )
    if config is None:
        config = found or recipe_of(state, layout, source)
        if heads_differ(state, layout):
            config.model.decoder.separate_heads = True
    node = copy.deepcopy(config.model)
    node.backbone.weights, node.text_encoder.weights = None, False
    with torch.device("meta"):
        shapes = instantiate(node).state_dict()
    return Imported(convert_weights(state, shapes, layout, account, source), account, config)


def tidy(state: dict[str, Tensor], source: str | Path) -> tuple[dict[str, Tensor], Account]:
    """Names as `their_names` gives them, without what isn't needed and without copies."""
    account, result = Account(), {}
    for name, value in state.items():
        canonical = canonical_name(name)
        if UNUSED.search(canonical):
            account.unused.append(name)
        elif canonical not in result:
            result[canonical] = value
        elif torch.equal(result[canonical], value):
            account.copies.append(name)
        else:
            raise ValueError(f"{source}: {name} should be a copy of {canonical}, but differs")
    return result, account


def layout_of(state: dict[str, Tensor]) -> str | None:
    """Whose names they are: "transformers", "idea", "ours", or None."""
    marks = {
        "model.encoder.layers.": "transformers",
        "transformer.encoder.": "idea",
        "enhancer.layers.": "ours",
    }
    found = {layout for name in state for mark, layout in marks.items() if name.startswith(mark)}
    return found.pop() if len(found) == 1 else None


def recipe_of(state: dict[str, Tensor], layout: str, source: str | Path) -> DictConfig:
    """The recipe for a tidied state without a config, by its first stage's width and its heads.

    Raises ValueError for a backbone that is neither Swin-T nor Swin-B.
    """
    pattern = re.compile(r".*patch_embed(dings)?\.proj(ection)?\.bias")
    width = next((len(value) for name, value in state.items() if pattern.match(name)), None)
    if width not in SIZES:
        raise ValueError(
            f"{source}: the first stage of its backbone has {width} channels, neither Swin-T's 96 "
            "nor Swin-B's 128; name the model's recipe with --config-file"
        )

    scaled = _find(state, layout, "query_selection.class_head.bias") is not None
    family = "mm_gdino" if scaled else "gdino"
    return LazyConfig.load(str(configs_folder() / f"common/models/{family}_{SIZES[width]}.py"))


def heads_differ(state: dict[str, Tensor], layout: str) -> bool:
    """Whether the decoder's layers have box heads of their own, whatever a config says: those of
    MM-Grounding-DINO do, and of Grounding DINO where mmdetection tuned it, or older transformers
    wrote a config without that setting."""
    biases = [_find(state, layout, f"decoder.box_head.{i}.layers.4.bias") for i in (0, 1)]
    return all(bias is not None for bias in biases) and not torch.equal(*biases)


def _find(state: dict[str, Tensor], layout: str, ours: str) -> Tensor | None:
    [theirs] = (ours,) if layout == "ours" else their_names(ours, layout)
    return state.get(theirs)


def convert_weights(
    state: dict[str, Tensor],
    shapes: dict[str, Tensor],
    layout: str,
    account: Account,
    source: str | Path,
) -> dict[str, Tensor]:
    """Our state dict of the names and shapes given; fills the account.

    Raises ValueError for anything that is missing, left over, or of another shape.
    """
    result, used, wrong = {}, set(), []
    for name, like in shapes.items():
        sources = (name,) if layout == "ours" else their_names(name, layout)
        if sources is None or not all(_plain(s) in state for s in sources):
            account.missing.append(name)
            continue
        used.update(map(_plain, sources))
        parts = [_part(state, s) for s in sources]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if value.dim() == 0 and like.shape == (1,):
            value = value[None]
        if value.shape != like.shape:
            wrong.append(f"{sources[0]} {list(value.shape)} for {name} {list(like.shape)}")
        same = len(parts) == 1 and value is state[_plain(sources[0])]
        (account.loaded if same else account.converted).append(name)
        result[name] = value.contiguous()
    for name in state.keys() - used:
        first = re.sub(r"^(bbox_embed|class_embed)\.\d+", r"\1.0", name)
        if first in used and torch.equal(state[first], state[name]):
            account.copies.append(name)
        else:
            account.unexpected.append(name)
    account.unexpected.sort()
    if wrong or account.missing or account.unexpected:
        problems = [f"{len(wrong)} of other shapes ({wrong[0]})"] if wrong else []
        problems += [
            f"{len(names)} {kind} ({', '.join(names[:3])})"
            for kind, names in (("missing", account.missing), ("unexpected", account.unexpected))
            if names
        ]
        raise IncompleteError(
            f"{source} is of another architecture, or not the whole of it: {'; '.join(problems)}",
            account,
        )
    check_tensors(result, shapes, source)
    return result


def export_directory(model: OpenVocabularyDetector, folder: str | Path) -> None:
    """Writes a dense detector as a directory that transformers loads: config, weights, tokenizer
    and the processor's settings.

    Raises ValueError where transformers has no such model.
    """
    config = transformers_config(model)
    state = {}
    for name, value in model.state_dict().items():
        theirs = their_names(name, "transformers")
        if theirs is None:
            raise ValueError(f"{name} has no name in transformers")
        for part, piece in zip(theirs, value.chunk(len(theirs)), strict=True):
            scalar = re.fullmatch(r"(.*_)?class_embed(\.\d+)?\.bias", part.removeprefix("model."))
            state[part] = (piece[0] if scalar else piece).clone().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [
        "MMGroundingDinoForObjectDetection"
        if config.model_type == "mm-grounding-dino"
        else "GroundingDinoForObjectDetection"
    ]
    config.save_pretrained(folder)
    write_safetensors(state, folder / "model.safetensors")
    model.text_encoder.tokenizer.save_pretrained(folder)
    settings = {
        "image_processor_type": "GroundingDinoImageProcessor",
        "processor_class": "GroundingDinoProcessor",
        "size": {"shortest_edge": 800, "longest_edge": 1333},
        "image_mean": [round(v / 255, 6) for v in model.pixel_mean.flatten().tolist()],
        "image_std": [round(v / 255, 6) for v in model.pixel_std.flatten().tolist()],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _plain(name: str) -> str:
    return re.sub(r"\[\d\]$", "", name)


def _part(state: dict[str, Tensor], name: str) -> Tensor:
    """A weight, or the k-th third of it for "name[k]"."""
    value = state[_plain(name)]
    return value.chunk(3)[int(name[-2])] if name.endswith("]") else value
