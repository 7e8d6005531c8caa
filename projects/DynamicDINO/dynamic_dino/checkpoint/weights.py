"""Checkpoints: load one completely or not at all, write small ones to ship, import public ones.

A frozen backbone or text encoder whose weights come from an installed package is not stored in
shipped files; a run that starts from one may train it all the same. An MoE model that loads a dense
checkpoint is converted on the way (see ``dynamic_dino.moe.layer``). What public weights are, and
how they become ours, see ``dynamic_dino.checkpoint.public``.

    python -m dynamic_dino.checkpoint export --config-file CONFIG model_final.pth OUT.safetensors
    python -m dynamic_dino.checkpoint export --config-file CONFIG model_final.pth DIRECTORY
    python -m dynamic_dino.checkpoint import hf:IDEA-Research/grounding-dino-tiny OUT.safetensors
    python -m dynamic_dino.checkpoint compress --config-file CONFIG model_final.pth OUT.safetensors
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..console import some
from ..sources import is_hub_spec, resolve
from .files import check_tensors, read_state_dict, write_safetensors
from .public import import_public

logger = logging.getLogger(__name__)

FROZEN_ENCODERS = ("backbone.", "text_encoder.body.")


def load_checkpoint(model: nn.Module, path: str | Path, skip: Sequence[str] = ()) -> None:
    """Loads .safetensors, or .pth of this project's trainer, into a model.

    A path "package:MODULE/FILE" names a file inside an installed package, such as the shipped
    "package:dynamic_dino/weights/nano_dense.safetensors"; "hf:OWNER/NAME" or "hf:DIRECTORY" public
    weights of Grounding DINO. What matches a pattern of `skip` (fnmatch) stays as it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is corrupt, is not what its checksum says, holds NaN or another kind
            of numbers, or doesn't match the model key by key and shape by shape; a pattern matches
            nothing.
    """
    if checked := is_hub_spec(path):
        state = import_public(path).state
    else:
        path = resolve(path, "checkpoint")
        state = read_state_dict(path)
        theirs = ("transformer.", "module.transformer.", "bbox_head.")
        if any(name.startswith(theirs) for name in state):
            raise ValueError(
                f"{path} has the names of IDEA's code or of mmdetection: make a checkpoint of it "
                f"with `python -m dynamic_dino.checkpoint import {path} OUT.safetensors`"
            )
    model_state = model.state_dict()
    skipped: set[str] = set()
    for pattern in skip:
        matching = fnmatch.filter(model_state, pattern)
        if not matching:
            raise ValueError(f"nothing of the model matches {pattern!r}, which should be skipped")
        skipped.update(matching)
        state = {k: v for k, v in state.items() if not fnmatch.fnmatchcase(k, pattern)}
    if not checked:
        check_tensors(state, model_state, path)
    encoders = _encoders(model)
    brought = tuple(prefix for prefix, encoder in encoders.items() if encoder.pretrained)
    absent = [k for k in model_state if k.startswith(FROZEN_ENCODERS) and k not in state]
    kept = [k for k in absent if k.startswith(brought or ("\0",))]
    if len(kept) < len(absent):
        first = next(k for k in absent if k not in kept)
        raise ValueError(
            f"{path} has no weights for {first} and {len(absent) - len(kept) - 1} more keys of an "
            "encoder that has no others: is it a shipped checkpoint of another configuration?"
        )
    replaced = [prefix for prefix in brought if _differ(state, model_state, prefix)]
    try:
        result = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:
        mismatches = str(error).strip().splitlines()  # of torch: a headline, a line a tensor
        what = some([line.strip() for line in mismatches[1:] or mismatches])
        raise ValueError(f"{path} is of another architecture than this config: {what}") from error
    missing = [k for k in result.missing_keys if k not in kept and k not in skipped]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path} is of another architecture than this config: "
            f"{_some_keys('missing', missing)}; {_some_keys('unexpected', result.unexpected_keys)}"
        )
    for prefix in replaced:
        encoders[prefix].pretrained = False  # what it brought is gone: it is to be stored
    logger.info(
        "Loaded %d tensors from %s, kept %d that encoders bring", len(state), path, len(kept)
    )


def export_weights(model: nn.Module, path: str | Path) -> None:
    """Writes the model in fp16, as safetensors, without the encoders that are frozen and still have
    the weights that they bring. Raises ValueError for weights that fp16 can't hold."""
    encoders = _encoders(model)
    skip = tuple(p for p, encoder in encoders.items() if encoder.frozen and encoder.pretrained)
    state = {
        k: v.half() if v.is_floating_point() else v
        for k, v in model.state_dict().items()
        if not k.startswith(skip or ("\0",))
    }
    check_tensors(state, {}, f"the model for {path}, in half precision")
    write_safetensors(state, path)


def _encoders(model: nn.Module) -> dict[str, nn.Module]:
    """By prefix those of `FROZEN_ENCODERS` that the model has; `load_detector` takes any module."""
    names = {prefix: prefix.partition(".")[0] for prefix in FROZEN_ENCODERS}
    return {p: getattr(model, name) for p, name in names.items() if hasattr(model, name)}


def _differ(state: dict[str, Tensor], own: dict[str, Tensor], prefix: str) -> bool:
    """Whether a checkpoint has other weights than the model for what begins with `prefix`."""
    both = [k for k in own if k.startswith(prefix) and k in state]
    return not all(torch.equal(state[k].to(own[k]), own[k]) for k in both)


def _some_keys(what: str, keys: list[str], show: int = 4) -> str:
    return f"{len(keys)} {what} keys" + (f" ({some(keys, show)})" if keys else "")
