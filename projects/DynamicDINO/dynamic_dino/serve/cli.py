"""The command ``python -m dynamic_dino.serve``: a detector behind an HTTP address."""

from __future__ import annotations

import argparse
import logging.config
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

from ..console import command, fail, program
from ..serving.options import (
    add_detection_options,
    add_model_options,
    check_numbers,
    make_detector,
    named,
    public_name,
)

NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
EXAMPLES = """\
examples:
  %(prog)s
  %(prog)s --model nano-dense --threads 2 --port 8080
  %(prog)s --weights hf:IDEA-Research/grounding-dino-tiny --dtype float16 --max-batch 8
  curl -F image=@photo.jpg -F names=cow -F names=horse http://127.0.0.1:8000/detect

It listens on this machine alone unless --host says otherwise, and knows no passwords: put it
behind a proxy that does. SIGTERM or Ctrl-C: it answers what it has accepted, and ends. Exit status:
0, or 2 if it couldn't start, or Ctrl-C was pressed twice.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=program(),
        description="Serves a detector over HTTP: an image and names in, JSON out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(p)
    add_detection_options(p)
    p.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's choice)")
    p.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    p.add_argument("--port", type=int, default=8000, help="0: any (default: %(default)s)")
    p.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        help="images that go through the model together (default: 8 on a GPU; 1 on a CPU, where "
        "more are no faster)",
    )
    p.add_argument(
        "--max-wait",
        type=float,
        default=5,
        metavar="MS",
        help="for which an image waits for others (default: %(default)g)",
    )
    p.add_argument(
        "--queue",
        type=int,
        default=64,
        metavar="N",
        help="requests that are accepted and not yet answered; more get 429 (default: %(default)s)",
    )
    p.add_argument(
        "--max-body",
        type=float,
        default=20,
        metavar="MB",
        help="of a request; larger ones get 413 (default: %(default)g)",
    )
    p.add_argument(
        "--max-pixels",
        type=float,
        default=50,
        metavar="MILLION",
        help="of an image; larger ones get 413 (default: %(default)g)",
    )
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if it couldn't start."""
    args = parser().parse_args(argv)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return fail(f"{missing[0]} is missing: pip install 'dynamic-dino[serve]'")
    # Imported late, so that --help and wrong arguments answer at once.
    import torch
    from PIL import Image
    from uvicorn.config import LOGGING_CONFIG

    from .app import Limits, make_app
    from .batching import Options
    from .server import Server, address_of, bound_socket

    # Doubts about a client's names and images: its user wouldn't see them, and Python remembers
    # each text that it has shown, for ever.
    warnings.simplefilter("ignore", UserWarning)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        check_numbers(args)
        check_limits(args)
        bound = bound_socket(args.host, args.port)
    except OSError as error:
        return fail(f"can't listen on {args.host}:{args.port} ({error}): give another --port")
    except ValueError as error:
        return fail(error)
    with bound:
        start = time.perf_counter()
        if args.threads:
            torch.set_num_threads(args.threads)
        try:
            detector = make_detector(args)
        except (ValueError, OSError) as error:
            return fail(error)
        seconds = time.perf_counter() - start
        print(f"{named(args)} on {detector.device}, loaded in {seconds:.1f} s", flush=True)
        limits = Limits(
            args.max_batch,
            args.max_wait / 1000,
            args.queue,
            int(args.max_body * 1e6),
            int(args.max_pixels * 1e6),
        )
        defaults = Options(args.threshold, args.max_detections, args.nms, args.nms_agnostic or None)
        app = make_app(detector, limits, defaults, public_name(args))
        logging.config.dictConfig(LOGGING_CONFIG)
        Server(app, address_of(bound.getsockname())).run(sockets=[bound])
    print(f"stopped: {app.state.gate.accepted} requests were accepted and answered")
    return 0


def check_limits(args: argparse.Namespace) -> None:
    least = {"threads": 1, "max_batch": 1, "queue": 1, "max_wait": 0}
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and not value >= smallest:
            raise ValueError(f"--{name.replace('_', '-')} {value:g} is less than {smallest}")
    for name in ("max_body", "max_pixels"):
        if not 0 < (value := getattr(args, name)) < 1e6:
            raise ValueError(f"--{name.replace('_', '-')} {value:g} is not between 0 and 1e6")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port} is not between 0 and 65535")
