"""Files of weights: whatever wraps them, as a state dict."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .plain_data import plain_data_allowed


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a file, whatever wraps them, and whatever plain data trainers stored beside
    them. Raises FileNotFoundError, or ValueError for a file that is corrupt or holds what could
    run code."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} doesn't exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with plain_data_allowed(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors', torch's and pickle's own are of many types
        if refused := _refused(str(error)):
            raise ValueError(
                f"checkpoint {path} holds {refused} besides weights, which could run code, so it "
                "isn't loaded. Get it as .safetensors; or, if you trust who wrote it, store the "
                "weights alone, where what it holds is installed:\n"
                f"    checkpoint = torch.load({str(path)!r}, weights_only=False);\n"
                "    torch.save(checkpoint['model'], 'weights.pth')  # or ['state_dict']"
            ) from error
        raise ValueError(f"checkpoint {path} is corrupt or incomplete: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # of mmdetection
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        # What the trainer evaluates: the averaged weights, where the run has them.
        averaged = state.get("ema")
        averaged = averaged.get("weights", {}) if isinstance(averaged, dict) else {}
        state = {**state["model"], **averaged}
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no weights: it should map names to tensors")
    return state


def _refused(error: str) -> str | None:
    """What a pickle would have to import or call, from torch's words for it; None for others."""
    if name := re.search(r"GLOBAL ([\w.]+)", error):
        return name[1]
    return "a call of a method" if "call reduce for unrecognized function" in error else None


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
