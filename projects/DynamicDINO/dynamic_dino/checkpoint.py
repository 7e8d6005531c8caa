"""Checkpoints: load one completely or not at all, and write small ones to ship.

A frozen tower whose weights come from an installed package is not stored in shipped files. An MoE
model that loads a dense checkpoint is converted on the way (see ``dynamic_dino.moe.layer``).

    python -m dynamic_dino.checkpoint export --config-file CONFIG model_final.pth OUT.safetensors
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from pickle import PickleError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .backbone import resolve_package_file

logger = logging.getLogger(__name__)

FROZEN_TOWERS = ("backbone.", "text_encoder.body.")


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads .safetensors, or .pth of this project's trainer, into a model.

    A path "package:MODULE/FILE" names a file inside an installed package, such as the shipped
    "package:dynamic_dino/weights/nano_dense.safetensors".

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is corrupt, or doesn't match the model key by key and shape by shape.
    """
    shipped = str(path).startswith("package:")
    path = resolve_package_file(str(path)) if shipped else Path(path)
    state = read_state_dict(path)
    model_state = model.state_dict()
    kept = [k for k in model_state if k.startswith(FROZEN_TOWERS) and k not in state]
    if kept and not _towers_are_frozen(model):
        raise ValueError(
            f"{path} has no weights for {kept[0]} and {len(kept) - 1} more keys of a tower that "
            "is not frozen: is it a shipped checkpoint of another configuration?"
        )
    try:
        result = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is of another architecture than this config: {error}") from error
    missing = [k for k in result.missing_keys if k not in kept]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path} is of another architecture than this config: "
            f"{_some('missing', missing)}; {_some('unexpected', result.unexpected_keys)}"
        )
    logger.info("Loaded %d tensors from %s, kept %d of frozen towers", len(state), path, len(kept))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a file, whatever wraps them; see `load_checkpoint` for what it raises."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} doesn't exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, PickleError) as error:
        raise ValueError(f"checkpoint {path} is corrupt or incomplete: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        # What the trainer evaluates: the averaged weights, where the run has them.
        state = {**state["model"], **state.get("ema", {}).get("weights", {})}
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no weights: it should map names to tensors")
    return state


def export_weights(model: nn.Module, path: str | Path) -> None:
    """Writes the model without its frozen towers, in fp16, as safetensors."""
    skip = FROZEN_TOWERS if _towers_are_frozen(model) else ()
    state = {
        k: (v.half() if v.is_floating_point() else v).contiguous()
        for k, v in model.state_dict().items()
        if not k.startswith(skip or ("\0",))
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def _towers_are_frozen(model: nn.Module) -> bool:
    return model.backbone.frozen and model.text_encoder.frozen


def _some(what: str, keys: list[str], show: int = 4) -> str:
    more = f" and {len(keys) - show} more" if len(keys) > show else ""
    return f"{len(keys)} {what} keys" + (f" ({', '.join(keys[:show])}{more})" if keys else "")


def main(arguments: Sequence[str] | None = None) -> None:
    from detectron2.config import instantiate

    from .engine.config import load_config  # it is not needed to load weights

    parser = argparse.ArgumentParser(prog="python -m dynamic_dino.checkpoint")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a small fp16 safetensors file to ship")
    export.add_argument("--config-file", required=True, help="the recipe of the checkpoint")
    export.add_argument("source", type=Path, help="checkpoint of a run")
    export.add_argument("out", type=Path, help="file to write, *.safetensors")
    args = parser.parse_args(arguments)
    model = instantiate(load_config(args.config_file).model)
    load_checkpoint(model, args.source)
    export_weights(model, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
