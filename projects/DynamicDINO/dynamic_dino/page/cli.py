"""The command ``python -m dynamic_dino.page``: detectors on a web page of this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ..console import command, fail, program
from ..serving.options import add_model_options, check_numbers, make_detector, named
from ..serving.shipped import SHIPPED_MODELS, THRESHOLD

EXAMPLES = """\
examples:
  %(prog)s
  %(prog)s --examples photos/
  %(prog)s --config-file output/mine/config.yaml --weights output/mine/model_final.pth

Open the address that it prints. It works without the internet, listens on this machine alone unless
--host says otherwise, and knows no passwords. Ctrl-C ends it.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=program(),
        description="A web page to try detectors on: a picture and names in, boxes out, and which "
        "experts saw what.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(p)
    p.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help="where the slider stands at first (default: %(default)s)",
    )
    p.add_argument("--examples", type=Path, metavar="FOLDER", help="pictures to offer")
    p.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    p.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    p.set_defaults(nms=None, nms_agnostic=False, max_detections=None)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if it couldn't start."""
    args = parser().parse_args(argv)
    if find_spec("gradio") is None:
        return fail("gradio is missing: pip install 'dynamic-dino[page]'")
    # Imported late, so that --help and wrong arguments answer at once.
    from ..data.image_files import find_images
    from .app import launch, make_page
    from .looking import Models

    try:
        check_numbers(args)
        examples = find_images([args.examples]) if args.examples else []
        models = Models(loaders(args))
        models.detector(named(args))  # what can't be loaded is said here, not on the page
        page = make_page(models, args.threshold, examples[:24])
        print(f"{named(args)} on http://{args.host}:{args.port}", flush=True)
        launch(page, args.host, args.port)
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


def loaders(args: argparse.Namespace) -> dict:
    """The model that was asked for first, then the shipped ones."""
    found = {named(args): partial(make_detector, args)}
    for name in SHIPPED_MODELS:
        own = argparse.Namespace(**{**vars(args), "model": name})
        own.config_file = own.weights = None
        found.setdefault(name, partial(make_detector, own))
    return found
