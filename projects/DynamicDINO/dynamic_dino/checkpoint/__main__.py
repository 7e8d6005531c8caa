"""Import public weights, and export ours; ``--help`` says how."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import instantiate

from ..config import load_config
from ..console import command, program
from .files import write_safetensors
from .public import export_directory, import_public
from .weights import export_weights, load_checkpoint


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=program())
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
    model = instantiate(load_config(args.config_file).model)
    load_checkpoint(model, args.source)
    if args.out.suffix == ".safetensors":
        export_weights(model, args.out)
    else:
        export_directory(model, args.out)
    size = sum(f.stat().st_size for f in [args.out, *args.out.glob("*")] if f.is_file())
    print(f"{args.out}: {size / 2**20:.1f} MiB")


def _import(args: argparse.Namespace) -> None:
    if args.out.suffix != ".safetensors":
        raise ValueError(f"{args.out}: the file to write is named *.safetensors")
    config = load_config(args.config_file) if args.config_file else None
    imported = import_public(args.source, config)
    write_safetensors(imported.state, args.out)
    print(imported.account.table())
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
