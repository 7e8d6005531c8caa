"""Import public weights, export ours, and leave out experts; ``--help`` says how."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import build, load_config
from ..console import command, program
from ..moe.compress import METHODS, compress
from ..moe.layer import MoEFeedForward
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
    fewer = commands.add_parser(
        "compress", help="make a dense detector of one with experts, or leave it fewer"
    )
    fewer.add_argument("--config-file", required=True, help="the recipe of the checkpoint")
    fewer.add_argument("source", help="checkpoint of a run that has experts")
    fewer.add_argument("out", type=Path, help="file to write, *.safetensors")
    fewer.add_argument(
        "--copies", type=int, metavar="N", help="of each FFN that stay (default: one, dense)"
    )
    fewer.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="average the copies that are most alike, or leave out those with the smallest load "
        "(default: %(default)s)",
    )
    fewer.add_argument(
        "--results",
        type=Path,
        help="results.json of an evaluation, which says how much each expert is used (default: the "
        "one below the checkpoint's folder, evaluation/*/results.json; without any, all count the "
        "same)",
    )
    args = parser.parse_args(arguments)
    try:
        {"export": _export, "import": _import, "compress": _compress}[args.command](args)
    except (ValueError, OSError) as error:
        if account := getattr(error, "account", None):
            print(account.table())
        parser.exit(2, f"error: {error}\n")


def _export(args: argparse.Namespace) -> None:
    model = build(load_config(args.config_file).model, "model")
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


def _compress(args: argparse.Namespace) -> None:
    if args.out.suffix != ".safetensors":
        raise ValueError(f"{args.out}: the file to write is named *.safetensors")
    model = build(load_config(args.config_file).model, "model")
    load_checkpoint(model, args.source)
    found = sorted(Path(args.source).parent.glob("evaluation/*/results.json"))
    results = args.results or next(iter(found), None)
    loads = _loads(results) if results else None
    print(f"loads of experts: {results or 'none known, all copies count the same'}")
    write_safetensors(compress(model, loads, args.copies, args.method), args.out)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")
    change = "the recipe of the dense model"
    if args.copies:
        parts = next(m.parts for m in model.modules() if isinstance(m, MoEFeedForward))
        change = f"{args.config_file} with router.num_experts={parts * args.copies}"
    print(f"It belongs to {change}.")


def _loads(path: Path) -> list[torch.Tensor]:
    """Of each mixture, from results.json of an evaluation."""
    try:
        return [torch.tensor(layer["load"]) for layer in json.loads(path.read_text())["routing"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no loads of experts ({error!r}): take evaluation/NAME/results.json of a run "
            "that has experts"
        ) from None


if __name__ == "__main__":
    main()
