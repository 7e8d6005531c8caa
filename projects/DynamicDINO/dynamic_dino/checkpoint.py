"""Checkpoints: load one completely or not at all, write small ones to ship, import public ones.

A frozen tower whose weights come from an installed package is not stored in shipped files. An MoE
model that loads a dense checkpoint is converted on the way (see ``dynamic_dino.moe.layer``). What
public weights are, and how they become ours, see ``dynamic_dino.checkpoint_import``.

    python -m dynamic_dino.checkpoint export --config-file CONFIG model_final.pth OUT.safetensors
    python -m dynamic_dino.checkpoint export --config-file CONFIG model_final.pth DIRECTORY
    python -m dynamic_dino.checkpoint import hf:IDEA-Research/grounding-dino-tiny OUT.safetensors
"""

from __future__ import annotations

import argparse
import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path
from pickle import PickleError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .backbone import resolve_package_file
from .hub import is_hub_spec

logger = logging.getLogger(__name__)

FROZEN_TOWERS = ("backbone.", "text_encoder.body.")


def load_checkpoint(model: nn.Module, path: str | Path, skip: Sequence[str] = ()) -> None:
    """Loads .safetensors, or .pth of this project's trainer, into a model.

    A path "package:MODULE/FILE" names a file inside an installed package, such as the shipped
    "package:dynamic_dino/weights/nano_dense.safetensors"; "hf:OWNER/NAME" or "hf:DIRECTORY" public
    weights of Grounding DINO. What matches a pattern of `skip` (fnmatch) stays as it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is corrupt, or doesn't match the model key by key and shape by shape;
            a pattern matches nothing.
    """
    if is_hub_spec(path):
        from .checkpoint_import import import_public  # it reads files as this module does

        state = import_public(path).state
    else:
        shipped = str(path).startswith("package:")
        path = resolve_package_file(str(path)) if shipped else Path(path)
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
    kept = [k for k in model_state if k.startswith(FROZEN_TOWERS) and k not in state]
    if kept and not _towers_are_frozen(model):
        raise ValueError(
            f"{path} has no weights for {kept[0]} and {len(kept) - 1} more keys of a tower that "
            "is not frozen, or has no others: is it a shipped checkpoint of another configuration?"
        )
    try:
        result = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is of another architecture than this config: {error}") from error
    missing = [k for k in result.missing_keys if k not in kept and k not in skipped]
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
    """And are what they are without a checkpoint."""
    return all(t.frozen and t.pretrained for t in (model.backbone, model.text_encoder))


def _some(what: str, keys: list[str], show: int = 4) -> str:
    more = f" and {len(keys) - show} more" if len(keys) > show else ""
    return f"{len(keys)} {what} keys" + (f" ({', '.join(keys[:show])}{more})" if keys else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dynamic_dino.checkpoint")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export", help="write a small fp16 file to ship, or a directory that transformers loads"
    )
    export.add_argument("--config-file", required=True, help="the recipe of the checkpoint")
    export.add_argument("source", help="checkpoint of a run")
    export.add_argument("out", type=Path, help="*.safetensors, or the directory")
    public = commands.add_parser(
        "import", help="make a checkpoint of public weights of Grounding DINO"
    )
    public.add_argument(
        "source",
        help="hf:OWNER/NAME, a directory of transformers, or a .pth of IDEA or mmdetection",
    )
    public.add_argument("out", type=Path, help="file to write, *.safetensors")
    public.add_argument(
        "--config-file", help="the recipe of the dense detector (default: what the source says)"
    )
    args = parser.parse_args(arguments)
    try:
        (_export if args.command == "export" else _import)(args)
    except (ValueError, OSError) as error:
        if account := getattr(error, "account", None):
            print(account.table())
        parser.exit(2, f"error: {error}\n")


def _export(args: argparse.Namespace) -> None:
    from detectron2.config import instantiate

    from .checkpoint_import import export_directory
    from .engine.config import load_config  # it is not needed to load weights

    model = instantiate(load_config(args.config_file).model)
    load_checkpoint(model, args.source)
    if args.out.suffix == ".safetensors":
        export_weights(model, args.out)
    else:
        export_directory(model, args.out)
    size = sum(f.stat().st_size for f in [args.out, *args.out.glob("*")] if f.is_file())
    print(f"{args.out}: {size / 2**20:.1f} MiB")


def _import(args: argparse.Namespace) -> None:
    from .checkpoint_import import import_public
    from .engine.config import load_config

    if args.out.suffix != ".safetensors":
        raise ValueError(f"{args.out}: the file to write is named *.safetensors")
    config = load_config(args.config_file) if args.config_file else None
    imported = import_public(args.source, config)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(imported.state, args.out)
    print(imported.account.table())
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
