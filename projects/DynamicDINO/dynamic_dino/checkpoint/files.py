"""Files of weights: whatever wraps them, as a state dict."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import PickleError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a file, whatever wraps them; raises FileNotFoundError, or
    ValueError for a file that is corrupt or holds more than weights."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} doesn't exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, PickleError) as error:
        if "GLOBAL" in str(error):  # torch's words for what it would have to import and call
            raise ValueError(
                f"checkpoint {path} holds Python objects besides weights, which could run code, so "
                "it isn't loaded: get it as .safetensors, or have the weights stored alone"
            ) from error
        raise ValueError(f"checkpoint {path} is corrupt or incomplete: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # of mmdetection
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        # What the trainer evaluates: the averaged weights, where the run has them.
        state = {**state["model"], **state.get("ema", {}).get("weights", {})}
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no weights: it should map names to tensors")
    return state


def read_directory(folder: Path) -> dict[str, Tensor]:
    """The weights of a directory of transformers: safetensors where it has them, also in parts."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_state_dict(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {k: v for part in parts for k, v in read_state_dict(folder / part).items()}
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
