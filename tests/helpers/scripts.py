"""Scripts of benchmarks/, run in this process: another one would import everything once more."""

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout

import pytest

# Overrides of a nano recipe for what is said of a script, and not of a detector.
SMALL_NANO = [
    "model.decoder.num_layers=1",
    "model.query_selection.num_queries=8",
    "model.decoder.layer.ffn.hidden=32",
    "model.decoder.layer.ffn.router.num_experts=4",
    "model.backbone.weights=null",
    "model.text_encoder.weights=False",
    "model.text_encoder.config={num_hidden_layers:1}",
]


def run_script(main: Callable, *arguments: object) -> str:
    """Calls a script's `main` as its command line would; returns what it prints.

    Raises:
        SystemExit: the script ended otherwise than by returning.
    """
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.setattr(sys, "argv", [sys.modules[main.__module__].__file__, *map(str, arguments)])
        main()
    return output.getvalue()
